"""Laws of sizes for the attention block and for losses over micro-batches; within their bounds."""

from __future__ import annotations

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import oracle
from pylora.conformance.laws.block import Block
from pylora.conformance.laws.law import Law
from pylora.conformance.problems import sizes_attention as sizes
from pylora.conformance.problems.layers import DTYPES
from pylora.conformance.testcase import Problem, Trial


def _block(t: Trial, p: Problem) -> Block:
    weights = {name: t.weight(W) for name, W in p.weights.items()}
    return Block(weights, p.adapters, p.shape, t.precision)


def _said(p: Problem) -> str:
    s, lengths = p.shape, p.shape.lengths
    rank = next(iter(p.adapters.values()))[0].shape[0]
    return (
        f"of {s.heads} heads of {s.head_dim}, {s.kv_heads} key heads, {len(lengths)} sequences of "
        f"up to {max(lengths)} rows, {p.x.shape[1]} inputs, rank {rank}"
    )


def _twice(p: Problem) -> float:
    return 2.0 if p.x.dtype.itemsize == 8 else 1.0 + 2.0**-20


def _forward(t: Trial, p: Problem) -> None:
    y = t.attention(p.x, p.weights, p.adapters, p.shape)
    shown = vars(p).get("shown")
    want = _block(t, p).forward(p.x, shown)
    t.expect(f"y {_said(p)}", y, want.value, _twice(p) * want.error, at=shown)


def _backward(t: Trial, p: Problem) -> None:
    dx, grads = t.attention_backward(p.dy, p.x, p.weights, p.adapters, p.shape)
    block = _block(t, p)
    block.forward(p.x)
    want, wants = block.backward(p.dy)
    t.expect(f"dx {_said(p)}", dx, want.value, _twice(p) * want.error)
    for name, pair in wants.items():
        for letter, got, w in zip("AB", grads[name], pair):
            what = f"d{letter} of {name} {_said(p)}"
            t.expect(what, got, w.value, _twice(p) * w.error)


def _loss(t: Trial, p: Problem) -> None:
    got = t.loss_gradients(p.batches, p.W, p.A, p.B, p.scale)
    W = t.weight(p.W)
    want = oracle.loss_gradients(p.batches, W, p.A, p.B, p.scale)
    limits = bounds.loss_gradients(p.batches, W, p.A, p.B, p.scale, t.precision)
    rows = sum(len(x) for x, _, _ in p.batches)
    said = f"of {len(p.batches)} micro-batches, {rows} rows, d, k = {list(W.shape)}, r = {len(p.A)}"
    for name, g, w, bound in zip(("dA", "dB"), got, want, limits):
        t.expect(f"{name} {said}", g, w, bound)


LAWS = (
    Law(
        "F15",
        "No size is a limit to attention.",
        "as A1: positions to 4097, sequences to 6147, heads, heads of a group, key heads, size of "
        "a head, inputs and rank to 98307, around the limits of F12",
        "a kernel for a usual head or a usual length is used for others",
        ("L-1", "A-4"),
        ("attention",),
        sizes.large_attentions,
        _forward,
        ("x",),
        dtypes=DTYPES,
        covering=sizes.long_attentions,
    ),
    Law(
        "B16",
        "No size is a limit to the gradients of attention.",
        "as A2, as far as F15 goes, but to 1539 positions, and 6147 elsewhere",
        "as F15, on the way back",
        ("L-1", "A-5"),
        ("attention_backward",),
        sizes.large_attentions,
        _backward,
        ("x", "dy"),
        dtypes=DTYPES,
        covering=lambda dtype, examples: sizes.attentions(dtype, examples, 4096),
    ),
    Law(
        "B19",
        "No size is a limit to the gradient of a step.",
        "as O1: rows of a batch, k, d and r to 98307, micro-batches to 6147",
        "rows or batches beyond a limit are left out, or counted otherwise",
        ("L-1", "O-1"),
        ("loss_gradients",),
        sizes.large_losses,
        _loss,
        ("W", "A", "B"),
        dtypes=DTYPES,
        covering=sizes.losses,
    ),
)
