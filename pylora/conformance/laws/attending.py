"""Laws of attention's options (windows, interleaved pairs, another scale), of its sizes, of shapes
that are none, and of the whole block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.laws.attention import backward_agrees, forward_agrees, within
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.session import Block, transformer
from pylora.conformance.problems.adapted import ALL_DTYPES
from pylora.conformance.problems.attending import (
    LAYOUTS,
    attending,
    beyond_attention,
    beyond_windows,
    blocks,
)
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array


def _block(t: Trial, p: Problem) -> Block:
    weights = {name: t.weight(W) for name, W in p.weights.items()}
    return Block(weights, p.adapters, p.shape, t.precision)


def _forward(t: Trial, p: Problem) -> None:
    forward_agrees(t, p, _block(t, p))


def _backward(t: Trial, p: Problem) -> None:
    backward_agrees(t, p, _block(t, p))


def _both(t: Trial, p: Problem) -> None:
    """Forward, and backward where there is one."""
    _forward(t, p)
    if callable(getattr(t.implementation, "attention_backward", None)):
        _backward(t, p)


def _outside(t: Trial, p: Problem) -> None:
    """Rows that lie before a query's window change: what the query sees is the same."""
    rng, s = np.random.default_rng(p.seed), p.shape
    which = int(rng.integers(len(s.lengths)))
    start, n = sum(s.lengths[:which]), s.lengths[which]
    query = int(rng.integers(n))
    first = max(0, query - s.window + 1)
    kept = np.arange(start + first, start + query + 1)
    x = rng.normal(size=p.x.shape).astype(p.x.dtype)
    x[kept] = p.x[kept]
    before = t.attention(p.x, p.weights, p.adapters, s)
    after = t.attention(x, p.weights, p.adapters, s)
    bound = 2 * within(p) * _block(t, p).forward(p.x).error[start + query]
    what = f"row {start + query}, of whose window of {s.window} nothing changed,"
    t.expect(what, after, before[start + query], bound, at=start + query)


def _wide_is_none(t: Trial, p: Problem) -> None:
    none = replace(p.shape, window=0)
    wide = replace(p.shape, window=max(p.shape.lengths) + p.seed % 3)
    want = t.attention(p.x, p.weights, p.adapters, none)
    y = t.attention(p.x, p.weights, p.adapters, wide)
    off: Any = 0.0
    if not t.bitwise:
        off = 2 * within(p) * _block(t, p.replaced(shape=none)).forward(p.x).error
    t.expect(f"y with a window of {wide.window} against y without", y, want, off)


def _interleaved_rows(a: Array, D: int) -> Array:
    """Rows of each head of D in the other order: row i to 2i, row i + D/2 to 2i + 1."""
    heads = a.reshape(-1, 2, D // 2, a.shape[1])
    return np.ascontiguousarray(heads.transpose(0, 2, 1, 3).reshape(a.shape))


def _permuted(t: Trial, p: Problem) -> None:
    """The interleaved block on rows put in its order is the half-split block."""
    half, D = replace(p.shape, rope_layout="half"), p.shape.head_dim
    want = t.attention(p.x, p.weights, p.adapters, half)
    weights, adapters = dict(p.weights), dict(p.adapters)
    for name in ("q_proj", "k_proj"):
        weights[name] = _interleaved_rows(weights[name], D)
        if name in adapters:
            A, B, s = adapters[name]
            adapters[name] = A, _interleaved_rows(B, D), s
    y = t.attention(p.x, weights, adapters, replace(p.shape, rope_layout="interleaved"))
    off = 2 * within(p) * _block(t, p.replaced(shape=half)).forward(p.x).error
    t.expect("y of interleaved rows against y of half-split ones", y, want, off)


def _no_shape(t: Trial, p: Problem) -> None:
    """Each of these is no attention."""
    s, m = p.shape, sum(p.shape.lengths)
    wrong = {
        "heads that the key heads do not divide": replace(s, heads=s.kv_heads * 2 + 1, kv_heads=2),
        "lengths of fewer rows than there are": replace(s, lengths=(*s.lengths[:-1], 0)),
        "lengths of more rows than there are": replace(s, lengths=(*s.lengths, 1)),
    }
    name = list(wrong)[p.seed % 3]
    t.attention(p.x, p.weights, p.adapters, s)
    weights = dict(p.weights)
    if name.startswith("heads"):
        sizes = {"q_proj": wrong[name].heads, "k_proj": 2, "v_proj": 2}
        for module, heads in sizes.items():
            weights[module] = np.ones((heads * s.head_dim, p.x.shape[1]), p.x.dtype)
        weights["o_proj"] = np.ones((p.x.shape[1], wrong[name].heads * s.head_dim), p.x.dtype)
    why = f"{name} ({wrong[name]}, {m} rows)"
    t.must_raise(why, "attention", p.x, weights, {}, wrong[name])


@st.composite  # type: ignore[untyped-decorator]
def _odd_heads(draw: Any) -> Problem:
    D, hidden = draw(pick((1, 3, 5, 7))), draw(pick((2, 3)))
    p = draw(attending())
    q, kv = p.shape.heads * D, p.shape.kv_heads * D
    sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
    weights = {n: np.ones(size, np.float32) for n, size in {**sizes, "o_proj": (hidden, q)}.items()}
    x = np.ones((len(p.x), hidden), np.float32)
    shape = replace(p.shape, head_dim=D)
    return Problem(**{**vars(p), "x": x, "weights": weights, "adapters": {}, "shape": shape})


def _odd(t: Trial, p: Problem) -> None:
    why = f"head_dim = {p.shape.head_dim}, which has no pairs to turn,"
    t.must_raise(why, "attention", p.x, p.weights, {}, p.shape)


def _whole_block(t: Trial, p: Problem) -> None:
    y = t.block(p.x, p.weights, p.adapters, p.shape, p.eps)
    weights = {n: t.weight(W) if W.ndim == 2 else W for n, W in p.weights.items()}
    want = transformer(p.x, weights, p.adapters, p.shape, p.eps, t.precision)
    t.expect("y", y, want.value, within(p) * want.error)


def _all_options(dtype: str = "float32") -> Any:
    return attending(dtype, window=True, layouts=LAYOUTS, scale=True, ragged=True)


def _together(t: Trial, p: Problem) -> None:
    """Those of the options that the implementation heeds, at once."""
    can = getattr(t.implementation, "attention_options", ())
    none: dict[str, Any] = {"window": 0} if "window" not in can else {}
    none |= {"rope_layout": "half"} if "interleaved" not in can else {}
    none |= {"scale": None} if "scale" not in can else {}
    if len(none) > 1:
        raise NotTested("attention has fewer than two options")
    _both(t, p.replaced(shape=replace(p.shape, **none)))


WINDOW = ("attention", "attention_window")
LAWS = (
    Law(
        "A10",
        "A window limits how many keys a token sees, in the gradients too.",
        "softmax over positions max(0, p - window + 1) .. p; windows of 1, 2, the length and about "
        "it, in A1's and A2's bound",
        "a window that is one too long or short, or that the backward pass does not know",
        ("A-9", "A-4", "A-5"),
        WINDOW,
        lambda dtype: attending(dtype, window=True),
        _both,
        ("x", "dy"),
        dtypes=ALL_DTYPES,
        cost=2,
        covering=beyond_windows,
    ),
    Law(
        "A11",
        "What lies before a token's window does not matter to it.",
        "y[p] stays within twice A10's bound when all rows but p - window + 1 .. p change",
        "as A10, shown without an oracle",
        ("A-9", "A-7"),
        WINDOW,
        lambda dtype: attending(dtype, window=True),
        _outside,
        (),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A12",
        "A window as long as the sequence is none.",
        "y(window >= length) = y(no window), bit for bit where bits are promised",
        "0 is taken for a window of nothing, or the last key falls out",
        ("A-9",),
        WINDOW,
        lambda dtype: attending(dtype, window=True),
        _wide_is_none,
        ("x",),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A13",
        "Interleaved rotary embedding turns the pairs (2i, 2i + 1) of q and of k.",
        "A1 and A2 with that layout",
        "half-split pairs, in q, in k, or in the backward pass alone",
        ("A-3", "A-5"),
        ("attention", "attention_interleaved"),
        lambda dtype: attending(dtype, layouts=("interleaved",)),
        _both,
        ("x", "dy"),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "A14",
        "The two layouts are one rotation of rows in two orders.",
        "y(interleaved, rows i to 2i and i + D/2 to 2i + 1) = y(half), within twice A1's bound",
        "as A13, shown without an oracle; or B is not put in the order of W",
        ("A-3",),
        ("attention", "attention_interleaved"),
        attending,
        _permuted,
        ("x",),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "A15",
        "Scores are multiplied by the scale that is given.",
        "softmax(scale q kᵀ) v in A1's and A2's bound",
        "1 / sqrt(head_dim) in its place or beside it",
        ("A-10", "A-4", "A-5"),
        ("attention", "attention_scale"),
        lambda dtype: attending(dtype, scale=True),
        _both,
        ("x", "dy"),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "A28",
        "A window, a scale and interleaved pairs act together as each does alone.",
        "A1 and A2 with all options of `attention_options` at once",
        "a kernel for one option passes over another, forward or backward",
        ("A-9", "A-10", "A-3", "A-5"),
        ("attention",),
        _all_options,
        _together,
        ("x", "dy"),
        dtypes=ALL_DTYPES,
        cost=2,
    ),
    Law(
        "A16",
        "The attention block keeps its bound for every size and layout in memory.",
        "A1 and A2 with groups of 3, heads of 6 and 10, sequences of no rows, strided arrays, and "
        "past every limit: positions, sequences, heads, key heads, head_dim, hidden, rank",
        "a kernel that serves the usual size and is wrong beyond it",
        ("A-4", "A-5", "A-7", "F-6"),
        ("attention",),
        lambda dtype: attending(dtype, ragged=True),
        _both,
        ("x", "dy"),
        dtypes=ALL_DTYPES,
        covering=beyond_attention,
    ),
    Law(
        "A17",
        "A shape that is none is refused.",
        "heads that key heads do not divide, and lengths that are not the rows', must raise",
        "rows or heads are left out, or memory beyond them is read",
        ("A-8",),
        ("attention", "float32"),
        attending,
        _no_shape,
        (),
    ),
    Law(
        "A18",
        "An odd head_dim is refused.",
        "head_dim = 1, 3, 5, 7 must raise: there is no pair for the last element",
        "the last element is not turned, or is paired with the next head's",
        ("A-8", "A-3"),
        ("attention", "float32"),
        _odd_heads,
        _odd,
        (),
    ),
    Law(
        "A19",
        "The transformer block agrees with the formulas.",
        "x₁ = x + attention(norm₁ x), y = x₁ + down_proj(swiglu(norm₂ x₁)), adapters on any of "
        "seven; running error analysis",
        "a residual, a norm or an adapter in the wrong place",
        ("A-1", "A-2", "A-6"),
        ("block",),
        blocks,
        _whole_block,
        ("x",),
        dtypes=ALL_DTYPES,
    ),
)
