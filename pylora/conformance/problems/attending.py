"""Hypothesis strategies for attention with windows, layouts and odd shapes, for decoding in chunks,
and for the whole block. Each takes the dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.problems.adapted import sizes
from pylora.conformance.problems.layers import SEEDS, np_dtype, pick, st
from pylora.conformance.problems.layouts import laid_out
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Problem
from pylora.types import Array

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
SCALES = (1.0, 2.0, -0.5, 0.0)
LAYOUTS = ("half", "interleaved")
_EITHER = st.booleans()
_LENGTHS = st.lists(st.sampled_from((1, 2, 3, 5, 9, 0)), min_size=1, max_size=3)


def projections(shape: AttentionShape, hidden: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "q_proj": (q, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, q),
    }


class Arrays:
    """Makes arrays of one dtype, of about unit size after a product."""

    def __init__(self, rng: np.random.Generator, dtype: str, layouts: bool = False) -> None:
        self.rng, self.dtype, self.layouts = rng, np.dtype(np_dtype(dtype)), layouts

    def rows(self, m: int, n: int) -> Array:
        return self._laid(self.rng.normal(size=(m, n)))

    def matrix(self, d: int, k: int) -> Array:
        return self._laid(self.rng.normal(size=(d, k)) / np.sqrt(max(1, k)))

    def _laid(self, a: Array) -> Array:
        layout = str(self.rng.choice(("C", "F", "stepped", "negative", "columns")))
        return laid_out(a.astype(self.dtype), layout if self.layouts else "C")

    def weights(self, sizes: dict[str, tuple[int, int]]) -> dict[str, Array]:
        return {name: self.matrix(d, k) for name, (d, k) in sizes.items()}

    def adapters(
        self, sizes: dict[str, tuple[int, int]], chosen: Any, r: int
    ) -> dict[str, tuple[Array, Array, float]]:
        return {
            n: (
                self.matrix(r, sizes[n][1]),
                self.matrix(sizes[n][0], r),
                float(self.rng.choice(SCALES)),
            )
            for n in chosen
        }


def _some(rng: np.random.Generator, names: tuple[str, ...]) -> list[str]:
    return [n for n in names if rng.random() < 0.5]


@st.composite  # type: ignore[untyped-decorator]
def attending(
    draw: Any,
    dtype: str = "float32",
    window: bool = False,
    layouts: tuple[str, ...] = ("half",),
    scale: bool = False,
    ragged: bool = False,
) -> Problem:
    """x, dy, weights, adapters of some projections, shape: 1 to 4 heads, 1 to 3 sequences.

    `window`: from 1 to beyond the longest sequence. `scale`: of the scores, not that of head_dim.
    `ragged`: arrays of every layout in memory, and sequences of no rows.
    """
    kv, group = draw(pick((1, 2, 3))), draw(pick((1, 2, 3)))
    D, hidden = draw(pick((2, 4, 6, 8, 10))), draw(pick((2, 3, 8)))
    lengths = tuple(draw(_LENGTHS))
    lengths = lengths if ragged else tuple(max(1, n) for n in lengths)
    longest = max(lengths)
    width = draw(pick((1, 2, 3, longest - 1, longest, longest + 1, 64))) if window else 0
    shape = AttentionShape(
        kv * group,
        kv,
        D,
        lengths,
        draw(pick((10000.0, 100.0, 1e6))),
        max(1, width) if window else 0,
        draw(pick(layouts)),
        draw(pick((0.25, 1.0, 0.01, 3.0))) if scale else None,
    )
    make, m = Arrays(np.random.default_rng(draw(SEEDS)), dtype, ragged), sum(lengths)
    wide = projections(shape, hidden)
    return Problem(
        x=make.rows(m, hidden),
        dy=make.rows(m, hidden),
        weights=make.weights(wide),
        adapters=make.adapters(wide, _some(make.rng, NAMES), draw(pick((1, 2, 5)))),
        shape=shape,
        seed=draw(st.integers(0, 2**16)),
    )


def attention_of(size: int, where: str, dtype: str, window: int = 0) -> Problem:
    """Attention that is `size` in one of: length, sequences, group (heads that share a key head),
    kv_heads, head_dim, hidden, rank, window."""
    heads = {"kv_heads": size, "group": 1}.get(where, 1)
    group, D = (size if where == "group" else 1), (size + size % 2 if where == "head_dim" else 2)
    lengths = {"length": (size,), "sequences": (1, 2) * (size // 2), "window": (size + 2,)}
    wide = size if where == "window" else window
    lasts = lengths.get(where, (3, 2))
    shape = AttentionShape(heads * group, heads, D, lasts, 10000.0, wide)
    make, hidden = Arrays(np.random.default_rng(size), dtype), size if where == "hidden" else 2
    modules = projections(shape, hidden)
    return Problem(
        x=make.rows(sum(lasts), hidden),
        dy=make.rows(sum(lasts), hidden),
        weights=make.weights(modules),
        adapters=make.adapters(modules, NAMES, size if where == "rank" else 1),
        shape=shape,
        seed=size,
        size=size,
        resized=lambda n: attention_of(max(2, n), where, dtype, window),
    )


def beyond_attention(dtype: str, examples: int) -> Iterator[Problem]:
    """Attention past every limit, one dimension at a time."""
    most = {"length": 128, "sequences": 64, "group": 32, "kv_heads": 32, "head_dim": 256}
    for where, top in {**most, "hidden": 1024, "rank": 256}.items():
        for size in sizes(top if dtype == "float32" else min(top, 16), examples):
            yield attention_of(size, where, dtype)


def beyond_windows(dtype: str, examples: int) -> Iterator[Problem]:
    """Windows past every limit, and long sequences with a small one."""
    for size in sizes(128 if dtype == "float32" else 16, examples):
        yield attention_of(size, "window", dtype)
        yield attention_of(size, "length", dtype, window=3)


# ---- in chunks -----------------------------------------------------------------------------------


@st.composite  # type: ignore[untyped-decorator]
def chunked(
    draw: Any, dtype: str = "float32", several: bool = True, switching: bool = False
) -> Problem:
    """1 to 4 sequences cut into chunks, and calls that each give some of them their next chunk: one
    by one, all at once, in another order, chunks of no rows among them.

    `calls`: [[(sequence, rows)]]; `lora`: of each call one adapters mapping for each run, by number
    in `adapters`. Without `switching` a sequence keeps its own all along.
    """
    kv, D = draw(pick((1, 2))), draw(pick((2, 4, 8)))
    group, hidden = draw(pick((1, 2))), draw(pick((2, 3, 8)))
    n = draw(pick((1, 2, 3, 4))) if several else 1
    lengths = [draw(pick((1, 2, 3, 5, 9, 17))) for _ in range(n)]
    window = draw(pick((0, 0, 1, 2, 3, 8)))
    shape = AttentionShape(
        kv * group, kv, D, (), draw(pick((10000.0, 100.0))), window, draw(pick(LAYOUTS))
    )
    rng = np.random.default_rng(draw(SEEDS))
    make, wide = Arrays(rng, dtype), projections(shape, hidden)
    adapters = [make.adapters(wide, _some(rng, NAMES), 2) for _ in range(3)]
    way = draw(pick(("ones", "two", "random", "with empty", "prompt and ones")))
    left = {7 * s + 2: cut(rng, length, way) for s, length in enumerate(lengths)}
    calls: list[list[tuple[int, int]]] = []
    while any(left.values()):
        ready = [s for s in left if left[s]]
        rng.shuffle(ready)
        take = 1 if draw(_EITHER) else len(ready)
        calls.append([(s, left[s].pop(0)) for s in ready[:take]])
    own = {s: int(rng.integers(3)) for s in left}
    pick_one = (lambda s: int(rng.integers(3))) if switching else own.get
    return Problem(
        x={s: make.rows(length, hidden) for s, length in zip(left, lengths)},
        weights=make.weights(wide),
        adapters=adapters,
        shape=shape,
        calls=calls,
        lora=[[pick_one(s) for s, _ in runs] for runs in calls],
        seed=int(rng.integers(2**16)),
    )


def cut(rng: np.random.Generator, length: int, way: str) -> list[int]:
    """The sizes of the chunks of a sequence."""
    if way == "ones":
        return [1] * length
    if way == "two":
        a = int(rng.integers(0, length + 1))
        return [a, length - a]
    if way == "prompt and ones":
        a = int(rng.integers(1, length + 1))
        return [a] + [1] * (length - a)
    edges = np.sort(rng.integers(0, length + 1, 3))
    parts = np.diff(np.concatenate([[0], edges, [length]])).tolist()
    if way == "with empty":
        parts.insert(int(rng.integers(len(parts))), 0)
        return [int(n) for n in parts]
    return [int(n) for n in parts if n] or [length]


def chunked_of(size: int, where: str, dtype: str, window: int = 0) -> Problem:
    """Decoding that is `size` in: cache (rows that lie there when 3 more come one by one), chunk
    (rows of a chunk after 3), or sequences (each with one row before and one more)."""
    shape = AttentionShape(1, 1, 2, (), 10000.0, window)
    rng = np.random.default_rng(size)
    make, wide = Arrays(rng, dtype), projections(shape, 2)
    if where == "sequences":
        lengths = [2] * size
        calls = [[(s, 1) for s in range(size)], [(s, 1) for s in reversed(range(size))]]
    else:
        chunks = [size, 1, 1, 1] if where == "cache" else [3, size, 1]
        lengths, calls = [sum(chunks)], [[(0, n)] for n in chunks]
    return Problem(
        x={s: make.rows(n, 2) for s, n in enumerate(lengths)},
        weights=make.weights(wide),
        adapters=[make.adapters(wide, ("q_proj", "v_proj"), 1)],
        shape=shape,
        calls=calls,
        lora=[[0] * len(runs) for runs in calls],
        seed=size,
        size=size,
        resized=lambda n: chunked_of(max(1, n), where, dtype, window),
    )


def beyond_chunks(dtype: str, examples: int) -> Iterator[Problem]:
    """Caches, chunks and numbers of sequences past every limit, with a small window too."""
    for size in sizes(256 if dtype == "float32" else 16, examples):
        for where in ("cache", "chunk"):
            yield chunked_of(size, where, dtype)
            yield chunked_of(size, where, dtype, window=3)
    for size in sizes(64 if dtype == "float32" else 8, examples):
        yield chunked_of(size, "sequences", dtype)


# ---- the whole block -----------------------------------------------------------------------------


@st.composite  # type: ignore[untyped-decorator]
def blocks(draw: Any, dtype: str = "float32") -> Problem:
    """x, the seven projections and two norms of one layer, adapters of some, shape and eps."""
    kv, group, D = draw(pick((1, 2))), draw(pick((1, 2))), draw(pick((2, 4)))
    hidden, inner = draw(pick((2, 3, 8))), draw(pick((1, 5, 8)))
    lengths = tuple(max(1, n) for n in draw(_LENGTHS))
    shape = AttentionShape(kv * group, kv, D, lengths)
    make = Arrays(np.random.default_rng(draw(SEEDS)), dtype)
    wide = projections(shape, hidden)
    wide = {**wide, "gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
    wide["down_proj"] = (hidden, inner)
    chosen = _some(make.rng, (*NAMES, "gate_proj", "up_proj", "down_proj"))
    norms = {n: make.rows(1, hidden)[0] + make.dtype.type(1) for n in ("norm1", "norm2")}
    return Problem(
        x=make.rows(sum(lengths), hidden),
        weights={**make.weights(wide), **norms},
        adapters=make.adapters(wide, chosen, draw(pick((1, 2)))),
        shape=shape,
        eps=draw(pick((1e-6, 1e-5, 1e-2))),
        seed=draw(st.integers(0, 2**16)),
    )
