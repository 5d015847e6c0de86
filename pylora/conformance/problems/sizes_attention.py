"""Attention, and losses over micro-batches, with one dimension large and the others tiny.

See sizes.py. Scores and logarithms are no integers, so the laws ask for the bound; in 16 bits the
inputs are zero but at the ends of the large dimension, or what one of a thousand terms is worth
would be within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from pylora.conformance.problems.layers import np_dtype, st
from pylora.conformance.problems.sizes import FEW, THOROUGH, edges, sized, walk
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Problem
from pylora.types import Array

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION = {
    "length": 1024,
    "sequences": 4096,
    "heads": 65536,
    "group": 65536,
    "kv": 65536,
    "head_dim": 65536,
    "hidden": 65536,
    "rank": 65536,
}
LONG = (4097,)  # a sequence of which only some rows are looked at: the work grows with the square
LOSS = {"rows": 65536, "batches": 4096, "k": 65536, "d": 65536, "r": 65536}
SMALL = 256  # beyond it sizes are walked past each limit only


def ends(a: Array, axis: int, narrow: bool) -> Array:
    """Zero but at the edges along the axis, in 16 bits but at both ends; short ones stay."""
    n = a.shape[axis]
    at = np.array([0, n - 2, n - 1]) if narrow else edges(n)
    if n < 64:
        return a
    kept = np.zeros(n, bool)
    kept[at] = True
    mine = kept[:, None] if axis == 0 else kept[None]
    out: Array = np.where(mine, a, a.dtype.type(0))
    return out


def attention(dtype: str, name: str, n: int, seed: int = 0) -> Problem:
    """An attention whose dimension `name` of ATTENTION is n."""
    kv = n if name == "kv" else 1
    heads = {"heads": n, "group": n, "kv": 2 * n}.get(name, 2)
    kv = n if name == "heads" else kv
    D = max(2, n + n % 2) if name == "head_dim" else (2 if name in ("heads", "kv") else 4)
    hidden, r = (n if name == "hidden" else 3), (n if name == "rank" else 2)
    lengths: tuple[int, ...] = (n,) if name == "length" else (3, 2)
    if name == "sequences":
        lengths = tuple(1 + i % 2 for i in range(n))
    # Of thousands of terms the score's bound is so wide that it says nothing of the shares.
    m, narrow = sum(lengths), np_dtype(dtype).itemsize == 2 or n > 1024
    rng = np.random.default_rng([seed, n, len(name)])
    out = {"q_proj": heads * D, "k_proj": kv * D, "v_proj": kv * D, "o_proj": hidden}
    inp = {"q_proj": hidden, "k_proj": hidden, "v_proj": hidden, "o_proj": heads * D}

    def make(rows: int, columns: int, axis: int | None = None) -> Array:
        a = rng.normal(size=(rows, columns)) / np.sqrt(min(columns, 8))
        a = a.astype(np_dtype(dtype))
        return a if axis is None else ends(a, axis, narrow)

    x = rng.normal(size=(m, hidden)).astype(np_dtype(dtype))
    if name in ("length", "hidden"):
        x = ends(x, 0 if name == "length" else 1, narrow)
    # Where a sum is long its factors are thinned: over a head's numbers, all heads, ranks.
    of_head = 0 if name == "head_dim" else None
    of_heads = 1 if narrow and name in ("heads", "group", "kv", "head_dim") else None
    of_rank = 1 if name == "rank" else None
    weights, adapters = {}, {}
    for p, s in zip(PROJECTIONS, (2.0, -0.5, 1.5, 0.5)):
        last = p == "o_proj"
        weights[p] = make(out[p], inp[p], of_heads if last else of_head)
        up = make(out[p], r, of_rank if last or of_head is None else of_head)
        adapters[p] = make(r, inp[p], of_heads if last else None), up, s
    dy = rng.normal(size=(m, hidden)).astype(np_dtype(dtype))
    shape = AttentionShape(heads, kv, D, lengths)
    return Problem(x=x, dy=dy, weights=weights, adapters=adapters, shape=shape, seed=seed)


def attentions(dtype: str, examples: int, most: int = 65536) -> Iterator[Problem]:
    """Each dimension of ATTENTION at the sizes of `walk`, in other dtypes than float32 up to 387:
    the bound of a block of 98307 is some tenths of a second's work."""
    for name, top in ATTENTION.items():
        if dtype != "float32" and examples < THOROUGH:
            top = SMALL
        top = min(top, most)
        for size in walk(min(examples, THOROUGH - 1), top, dtype=dtype):
            if size <= SMALL or size == 1025 or size > top:
                yield sized(partial(attention, dtype, name), size)


def long_attentions(dtype: str, examples: int) -> Iterator[Problem]:
    """As attentions; and sequences so long that only their edges are looked at."""
    yield from attentions(dtype, examples)
    if dtype == "float32" and examples >= FEW:
        for n in LONG if examples < THOROUGH else (*LONG, 8193):
            p = attention(dtype, "length", n)
            yield p.replaced(shown=edges(n)[-12:])


@st.composite  # type: ignore[untyped-decorator]
def large_attentions(draw, dtype: str) -> Problem:  # type: ignore[no-untyped-def]
    """One dimension of a size drawn evenly by its power of two."""
    name = draw(st.sampled_from(tuple(ATTENTION)))
    return attention(dtype, name, int(2.0 ** draw(st.floats(0.0, 6.5, width=16))))


# ---- losses --------------------------------------------------------------------------------------


def loss(dtype: str, name: str, n: int, seed: int = 0) -> Problem:
    """Micro-batches whose dimension `name` of LOSS is n; one row of eight is not counted."""
    size = {"k": 5, "d": 4, "r": 2, "rows": 3, "batches": 2, name: n}
    rng, narrow = np.random.default_rng([seed, n, len(name)]), np_dtype(dtype).itemsize == 2

    def make(rows: int, columns: int, axis: int | None = None) -> Array:
        a = rng.integers(1, 4, (rows, columns)) * rng.choice((-1, 1), (rows, columns))
        b = a.astype(np.float32).astype(np_dtype(dtype))
        return b if axis is None else ends(b, axis, narrow)

    lengths = [size["rows"], 4] if name != "batches" else [1 + i % 2 for i in range(n)]
    total = sum(lengths)
    along = 0 if name in ("rows", "batches") else (1 if name == "k" else None)
    x, target = make(total, size["k"], along), make(total, size["d"], 0 if along == 0 else None)
    counted = np.arange(total) % 8 != 3
    cuts = np.cumsum(lengths)[:-1]
    batches = list(zip(np.split(x, cuts), np.split(target, cuts), np.split(counted, cuts)))
    A, B = make(size["r"], size["k"]), make(size["d"], size["r"], 1 if name == "r" else None)
    return Problem(batches=batches, W=make(size["d"], size["k"]), A=A, B=B, scale=2.0)


def losses(dtype: str, examples: int) -> Iterator[Problem]:
    """Each dimension of LOSS at the sizes of `walk`."""
    for name, top in LOSS.items():
        if dtype != "float32" and examples < THOROUGH:
            # Each batch is a call: thousands of them are made in one dtype. The oracle of float64
            # is ten times slower; what is large in all dtypes is large in F12 and B14.
            top = SMALL if name == "batches" else 4096
        for size in walk(examples, top, top, dtype):
            if size <= SMALL or size == 1025 or size > top or examples >= THOROUGH:
                yield sized(partial(loss, dtype, name), size)


@st.composite  # type: ignore[untyped-decorator]
def large_losses(draw, dtype: str) -> Problem:  # type: ignore[no-untyped-def]
    """One dimension of a size drawn evenly by its power of two."""
    name = draw(st.sampled_from(tuple(LOSS)))
    return loss(dtype, name, int(2.0 ** draw(st.floats(0.0, 9.5, width=16))))
