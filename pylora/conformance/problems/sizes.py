"""Problems with one dimension large and the others tiny: where code that serves a usual size stops.

A kernel that is right up to a size and wrong beyond shows only beyond it, and which size that is
nobody says: so these are no strategies but lists, walked from end to end before anything is drawn.
For each dimension of each method they have one less, exactly, and one more than each of LIMITS,
and what lies past the last. All numbers are small integers, so that laws ask for equality.

Each problem can be made again with another size (`resized`), which is how a counterexample becomes
the smallest size that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from pylora.conformance.problems.layers import FINE, integer_array, np_dtype, st
from pylora.conformance.testcase import Problem
from pylora.types import Array

LIMITS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096, 65536)
PASSED = (8, 32, 256)  # of them, in other dtypes than float32
BEYOND = 131  # by so much the last limit is passed, where there is little time
TINY = {"m": 3, "k": 5, "d": 4, "r": 2}
SQUARE = 257  # of two dimensions at once: more than 2¹⁶ elements
THOROUGH = 1000  # examples from which on the rarer problems are walked too
FEW = 30  # examples below which one size is tried of each dimension, beyond 1024
Make = Callable[[int], Problem]


def walk(examples: int, top: int, most: int = LIMITS[-1], dtype: str = "float32") -> list[int]:
    """The sizes of one dimension: around each limit up to `top`, or up to `most` where there is
    time for it, with the largest first, since what is wrong beyond a limit is wrong there too.

    Where there is little time nothing is right at a limit of tens of thousands, the last is passed
    by less, and of dtypes but float32 it is only a few that are passed."""
    top = most if examples >= THOROUGH else min(top, 1024) if examples < FEW else top
    limits = [n for n in LIMITS if n <= top]
    past = top + (top // 2 + 3 if examples >= THOROUGH else min(top // 2 + 3, BEYOND))
    if examples < FEW:
        return [past]
    if dtype != "float32" and examples < THOROUGH:
        return [past, *(n + 1 for n in reversed(limits) if n in PASSED)]
    if examples < THOROUGH:
        limits = [n for n in limits if n < top or n <= 4096]
    around = (1, 0, -1) if examples >= THOROUGH else (1, 0)
    return [past, *(n + i for n in reversed(limits) for i in around)]


def sized(make: Make, size: int) -> Problem:
    """make(size), which can be made again."""
    return make(size).replaced(size=size, resized=lambda n: make(n).replaced(size=n))


def edges(n: int) -> Array:
    """The ends of 0 .. n - 1 and what is beside each power of two: [positions], ascending."""
    powers = 2 ** np.arange(3, 18)
    near = np.concatenate([[0, 1, n - 2, n - 1], powers - 1, powers, powers + 1])
    return np.unique(near[(near >= 0) & (near < n)])


def whole(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    """Integers other than zero: nothing that is lost goes unseen."""
    limit = 1 if np_dtype(dtype).itemsize == 2 else 3
    magnitude = rng.integers(1, limit + 1, shape)
    signed = magnitude * rng.choice((-1, 1), shape)
    return signed.astype(np.float32).astype(np_dtype(dtype))


def thinned(a: Array, axis: int) -> Array:
    """Zero but for `edges` along the axis, dealt out to the lines across it: sums along it stay
    within the 8 bits of bfloat16, and an element that is lost at an edge is the sum's sixteenth."""
    n = a.shape[axis]
    kept = np.zeros(n, np.int64) - 1
    at = edges(n)
    kept[at] = np.arange(len(at))
    across = np.arange(a.shape[1 - axis])
    lines = min(len(across), 4)
    mine = (kept[:, None] >= 0) & ((kept[:, None] + across[None]) % lines == 0)
    out: Array = np.where(mine if axis == 0 else mine.T, a, a.dtype.type(0))
    return out


CARRY = ((), ("W", "A", "bias"), ("x",), ("dy",), ("B",))  # see problems/layers.py


def layer(dtype: str, seed: int = 0, thin: str = "", **sizes: int) -> Problem:
    """x, W, A, B, dy, bias, scale of the sizes m, k, d, r. `thin`: the dimension along which the
    factors of sums are thinned, which 16 bits need where it is large."""
    n = {**TINY, **sizes}
    rng = np.random.default_rng([seed, *n.values()])
    carriers = CARRY[sum(n.values()) % len(CARRY)] if dtype == "float64" else ()
    shapes = {"x": "mk", "W": "dk", "A": "rk", "B": "dr", "dy": "md"}

    def make(name: str, shape: tuple[int, ...]) -> Array:
        a = whole(rng, shape, dtype)
        return a + FINE * integer_array(rng, shape, dtype=dtype) if name in carriers else a

    fields: dict[str, Any] = {
        name: make(name, (n[pair[0]], n[pair[1]])) for name, pair in shapes.items()
    }
    for name, axis in {"k": ("x", 1), "r": ("B", 1), "d": ("dy", 1), "m": ("dy", 0)}.items():
        if name == thin:
            fields[axis[0]] = thinned(fields[axis[0]], axis[1])
    bias = make("bias", (n["d"],)) if seed % 2 == 0 else None
    return Problem(**fields, bias=bias, scale=(2.0, -1.0, 0.5, -2.0)[seed % 4], seed=seed)


def _layer_of(dtype: str, seed: int, thin: str, name: str, n: int) -> Problem:
    return layer(dtype, seed, thin, **{name: n})


def layers(dtype: str, examples: int, top: int = LIMITS[-1]) -> Iterator[Problem]:
    """Each of m, k, d and r large, and pairs of them that are middling."""
    narrow = np_dtype(dtype).itemsize == 2
    for name in "mkdr":
        for i, size in enumerate(walk(examples, top, dtype=dtype)):
            yield sized(partial(_layer_of, dtype, i, "", name), size)
            if narrow:
                yield sized(partial(_layer_of, dtype, i, name, name), size)
    for pair in ("mk", "mr", "dk", "md", "dr", "kr")[: 6 if examples >= FEW else 1]:
        yield layer(dtype, 1, "", **dict.fromkeys(pair, SQUARE))


@st.composite  # type: ignore[untyped-decorator]
def large_layers(draw: Any, dtype: str, dimensions: str = "mkdr") -> Problem:
    """One dimension of a size drawn evenly by its power of two, the others tiny."""
    name = draw(st.sampled_from(tuple(dimensions)))
    size = int(2.0 ** draw(st.floats(0.0, 12.5, width=16)))
    seed, thin = draw(st.integers(0, 99)), name if draw(st.booleans()) else ""
    return layer(dtype, seed, thin, **{name: size})


# ---- several adapters ----------------------------------------------------------------------------


def several(
    dtype: str,
    ranks: list[int],
    rows: Array,
    k: int = TINY["k"],
    d: int = TINY["d"],
    seed: int = 0,
    thin: str = "",
) -> Problem:
    """x, W, bias, adapters of these ranks, and which of them each row uses."""
    rng = np.random.default_rng([seed, len(ranks), len(rows), sum(ranks), k, d])
    total = sum(ranks)
    x, W = whole(rng, (len(rows), k), dtype), whole(rng, (d, k), dtype)
    A, B = whole(rng, (total, k), dtype), whole(rng, (d, total), dtype)
    if thin == "r":
        B = thinned(B, 1)
    if thin == "k":
        x = thinned(x, 1)
    ends = np.cumsum(ranks)
    scales = (2.0, -1.0, -2.0, 0.0, 1.0) if x.dtype.itemsize == 2 else (2.0, -1.0, 0.5, -2.0, 0.0)
    adapters = [
        (A[end - r : end], np.ascontiguousarray(B[:, end - r : end]), scales[i % len(scales)])
        for i, (r, end) in enumerate(zip(ranks, ends))
    ]
    bias = whole(rng, (d,), dtype) if seed % 2 == 0 else None
    rows = np.asarray(rows, np.int64)
    return Problem(x=x, W=W, bias=bias, adapters=adapters, rows=rows, seed=seed)


def _mixed_by(dtype: str, name: str, thin: bool) -> Make:
    def make(n: int) -> Problem:
        if name in ("k", "d"):
            sizes = {name: n}
            return several(dtype, [2, 1], np.array([0, 1, -1, 0]), thin=name * thin, **sizes)
        if name == "rank":  # one large rank beside small ones, before and after it
            return several(dtype, [2, n, 1], np.array([1, 0, 2, 1, -1]), thin="r" * thin)
        if name == "adapters used":
            return several(dtype, [1 + i % 2 for i in range(n)], np.arange(n)[::-1], seed=1)
        if name == "adapters":
            used = edges(n)
            return several(dtype, [1] * n, np.concatenate([used[::-1], [-1]]))
        if name == "segments":
            return several(dtype, [2, 1], np.arange(n) % 3 - 1)
        # Rows of a segment: one long run between two short ones.
        return several(dtype, [2, 1, 3], np.concatenate([[1, 1], np.zeros(n, int), [2, -1]]))

    return make


def _most_adapters(dtype: str, examples: int) -> int:
    """Each adapter is a call: many of them are walked in one dtype, and where there is time."""
    return 4096 if examples >= (FEW if dtype == "float32" else THOROUGH) else 256


def mixed(dtype: str, examples: int) -> Iterator[Problem]:
    """A mixed batch: its rows, their runs, the adapters, their ranks, k and d."""
    narrow = np_dtype(dtype).itemsize == 2
    tops = {"rank": 65536, "segments": 65536, "rows": 65536, "k": 65536, "d": 65536}
    many = _most_adapters(dtype, examples)
    for name, top in {**tops, "adapters": many, "adapters used": many}.items():
        for size in walk(examples, top, dtype=dtype):
            yield sized(_mixed_by(dtype, name, False), size)
            if narrow and name in ("rank", "k"):
                yield sized(_mixed_by(dtype, name, True), size)
    if dtype == "float32" and examples >= FEW:
        yield sized(_mixed_by(dtype, "adapters", False), 65537)


def stacked(dtype: str, examples: int) -> Iterator[Problem]:
    """Adapters that are active at once: how many, their ranks, m, k and d."""
    narrow = np_dtype(dtype).itemsize == 2

    def make(name: str, n: int, *, thin: bool = False) -> Problem:
        thinner = ("r" if name in ("adapters", "rank") else name) * thin
        if name == "adapters":
            return several(dtype, [1 + i % 2 for i in range(n)], np.zeros(3), thin=thinner)
        if name == "rank":
            return several(dtype, [2, n, 1], np.zeros(3), thin=thinner)
        if name == "m":
            return several(dtype, [2, 1], np.zeros(n))
        return several(dtype, [2, 1], np.zeros(3), thin=thinner, **{name: n})

    many = _most_adapters(dtype, examples)
    for name, top in {"rank": 65536, "m": 65536, "k": 65536, "d": 65536, "adapters": many}.items():
        for size in walk(examples, top, dtype=dtype):
            if not narrow or name != "adapters":
                yield sized(partial(make, name), size)
            if narrow and name in ("rank", "k", "adapters"):
                yield sized(partial(make, name, thin=True), size)


@st.composite  # type: ignore[untyped-decorator]
def large_several(draw: Any, dtype: str) -> Problem:
    """One of a mixed batch's dimensions of a size drawn evenly by its power of two."""
    name = draw(st.sampled_from(("rank", "rows", "segments", "adapters", "k", "d")))
    size = int(2.0 ** draw(st.floats(0.0, 9.5, width=16)))
    return _mixed_by(dtype, name, draw(st.booleans()))(size)
