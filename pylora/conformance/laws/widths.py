"""Laws of widths: every sum of every method is kept in enough bits, in each dtype (N-2).

Within the bounds; what they would not show of a short sum they show of a long one of one sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.block import Block
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.sizes import has
from pylora.conformance.laws.sizes_chance import mask_of
from pylora.conformance.problems import widths
from pylora.conformance.problems.layers import DTYPES, np_dtype, st
from pylora.conformance.problems.sizes_attention import attention
from pylora.conformance.testcase import Problem, Trial

PARTS = 512  # terms from which on each is a batch of its own as well
STORED = 2  # roundings to 16 bits that dropout adds; see laws/dropout.py


def _said(p: Problem) -> str:
    m, k, (d, r) = p.x.shape[0], p.x.shape[1], p.B.shape
    return f"of m = {m}, k = {k}, d = {d}, r = {r} terms of one sign"


def _forward(t: Trial, p: Problem) -> None:
    W, lora = t.weight(p.W), [(p.A, p.B, p.scale)]
    bound = bounds.forward(p.x, W, lora, precision=t.precision)
    want = oracle.forward(p.x, W, lora)
    t.expect(f"y {_said(p)}", t.forward(p.x, p.W, p.A, p.B, p.scale), want, bound)
    base = oracle.forward(p.x, W, []), bounds.forward(p.x, W, [], precision=t.precision)
    if has(t, "base"):
        t.expect(f"y without adapter, {_said(p)}", t.base(p.x, p.W), *base)
    if has(t, "module"):
        module = t.module(p.W.copy())
        t.expect(f"y of the module, {_said(p)}", module.forward(p.x), *base)
        module.attach(p.A, p.B, p.scale)
        what = f"y of the module with adapter, {_said(p)}"
        t.expect(what, module.forward(p.x), want, bound)


def _several(t: Trial, p: Problem) -> None:
    W = t.weight(p.W)
    if has(t, "forward_stacked"):
        y = t.forward_stacked(p.x, p.W, p.adapters)
        bound = bounds.forward(p.x, W, p.adapters, precision=t.precision)
        t.expect(f"y of both {_said(p)}", y, oracle.forward(p.x, W, p.adapters), bound)
    if has(t, "forward_mixed"):
        y = t.forward_mixed(p.x, p.W, p.adapters, p.rows)
        want = oracle.mixed(p.x, W, p.adapters, p.rows)
        t.expect(f"y of a mixed batch {_said(p)}", y, want, allowed.mixed_bound(t, p))


def _backward(t: Trial, p: Problem) -> None:
    W = t.weight(p.W)
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    want = oracle.backward(p.dy, p.x, W, p.A, p.B, p.scale)
    limits = bounds.backward(p.dy, p.x, W, p.A, p.B, p.scale, precision=t.precision)
    for name, g, w, bound in zip(("dx", "dA", "dB"), got, want, limits):
        t.expect(f"{name} {_said(p)}", g, w, bound)
    if has(t, "loss_gradients"):
        counted = np.ones(len(p.x), bool)
        steps = [[(p.x, p.dy, counted)] * 2]
        if PARTS <= len(p.x) < 2 * PARTS and (p.dy == 1).all():  # each row a batch of its own
            steps.append([(p.x[i : i + 1], p.dy[i : i + 1], counted[:1]) for i in range(len(p.x))])
        for batches in steps:
            pair = t.loss_gradients(batches, p.W, p.A, p.B, p.scale)
            wants = oracle.loss_gradients(batches, W, p.A, p.B, p.scale)
            offs = bounds.loss_gradients(batches, W, p.A, p.B, p.scale, t.precision)
            for name, g, w, bound in zip(("dA", "dB"), pair, wants, offs):
                said = f"{name} of a step of {len(batches)} batches {_said(p)}"
                t.expect(said, g, w, bound)


def _dropout(t: Trial, p: Problem) -> None:
    """The mask is 0 or 2, so that y is that of x masked, and as exact."""
    mask, W = mask_of(t, p), t.weight(p.W)
    y, dx, dA, dB = oracle.dropped(p.dy, p.x, mask, W, p.A, p.B, p.scale)
    got = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
    lora = [(p.A, p.B, 2 * p.scale)]
    bound = bounds.forward(p.x, W, lora, None, 4, t.precision, STORED)
    t.expect(f"y with dropout {_said(p)}", got, y, bound)
    if has(t, "dropout_backward"):
        grads = t.dropout_backward(p.dy, p.x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
        args = p.dy, p.x, W, p.A, p.B, 2 * p.scale
        limits = bounds.backward(*args, 4, t.precision, STORED)
        for name, g, w, off in zip(("dx", "dA", "dB"), grads, (dx, dA, dB), limits):
            t.expect(f"{name} with dropout {_said(p)}", g, w, off)


def _merge(t: Trial, p: Problem) -> None:
    merged = t.merge(p.W, p.A, p.B, p.scale)
    W = merged[0] if isinstance(merged, tuple) else merged
    want, bound = oracle.merged(p.W, p.A, p.B, p.scale), bounds.merged(p.W, p.A, p.B, p.scale)
    t.expect(f"W' {_said(p)}", W, want, bound)


def _attention(t: Trial, p: Problem) -> None:
    block = Block({n: t.weight(W) for n, W in p.weights.items()}, p.adapters, p.shape, t.precision)
    want, twice = block.forward(p.x), 2.0 if p.x.dtype.itemsize == 8 else 1.0 + 2.0**-20
    y = t.attention(p.x, p.weights, p.adapters, p.shape)
    said = f"of {p.x.shape[1]} inputs, {p.shape.head_dim} numbers a head, {len(p.x)} rows"
    t.expect(f"y {said}", y, want.value, twice * want.error)
    if has(t, "attention_backward"):
        dx, grads = t.attention_backward(p.dy, p.x, p.weights, p.adapters, p.shape)
        want, wants = block.backward(p.dy)
        t.expect(f"dx {said}", dx, want.value, twice * want.error)
        for name, pair in wants.items():
            for letter, got, w in zip("AB", grads[name], pair):
                t.expect(f"d{letter} of {name} {said}", got, w.value, twice * w.error)


def _attentions(dtype: str, examples: int) -> Any:
    for name, n in (("hidden", 600), ("rank", 600), ("length", 300), ("head_dim", 600)):
        yield _of_one_sign(attention(dtype, name, n), dtype)


def _of_one_sign(p: Problem, dtype: str) -> Problem:
    """All numbers positive, and scores that are small, so that every key counts."""
    kind = np_dtype(dtype)

    def positive(a: Any, scale: float = 1.0) -> Any:
        return (scale * (0.5 + np.abs(np.tanh(a.astype(np.float64))))).astype(kind)

    n = p.x.shape[1]
    weights = {
        name: positive(W, (0.02 if name in ("q_proj", "k_proj") else 1.0) / np.sqrt(n))
        for name, W in p.weights.items()
    }
    low = {"q_proj": 0.02, "k_proj": 0.02}
    adapters = {
        name: (positive(A, low.get(name, 1.0) / n), positive(B, 1 / B.shape[1]), 1.0)
        for name, (A, B, _) in p.adapters.items()
    }
    return p.replaced(x=positive(p.x), dy=positive(p.dy), weights=weights, adapters=adapters)


def _any_attention(dtype: str) -> Any:
    return st.builds(
        lambda name, n: _of_one_sign(attention(dtype, name, n), dtype),
        st.sampled_from(("hidden", "rank", "length", "head_dim")),
        st.integers(2, 40),
    )


def _law(id: str, sentence: str, spec: str, needs: tuple[str, ...], of: str, check: Any) -> Law:
    return Law(
        id,
        sentence,
        f"as F3: one of {', '.join(of)} is 600 or 2049, of ones, of numbers near 1, or of a 1 and "
        "63 that are below half of its last bit in bfloat16; within the bound",
        "sums are kept in the 16 bits of the inputs, or float64 is summed in float32",
        ("L-2", "N-2", spec),
        needs,
        lambda dtype: widths.any_width(dtype, of),
        check,
        dtypes=DTYPES,
        covering=lambda dtype, examples: widths.widths(dtype, examples, of),
    )


LAWS = (
    _law(
        "F14", "Forward sums are wide enough, a module's too.", "F-1", ("forward",), "kr", _forward
    ),
    _law(
        "B18",
        "Gradients' sums are wide enough, a step's too.",
        "B-1",
        ("backward",),
        "mkdr",
        _backward,
    ),
    _law("M17", "The sum over the rank is wide enough in a merge.", "M-1", ("merge",), "r", _merge),
    _law(
        "M18", "Sums are wide enough with dropout.", "D-1", ("dropout_forward",), "mkdr", _dropout
    ),
    _law(
        "M19", "Sums are wide enough in mixed batches.", "X-3", ("forward_mixed",), "kr", _several
    ),
    Law(
        "F20",
        "Sums are wide enough in the attention block.",
        "as A1 and A2: 600 inputs, a rank or a head of 600, 300 rows, all of one sign",
        "as F14; scores, or what the shares multiply, are summed in 16 bits",
        ("L-2", "N-2", "A-4"),
        ("attention",),
        _any_attention,
        _attention,
        (),
        dtypes=DTYPES,
        covering=_attentions,
    ),
)
