"""Laws of the random stream behind dropout: that the elements of a mask, and the masks of different
seeds, have nothing to do with each other.

What is counted is in battery.py; how often a count deceives, and what it is sure to see, is in
bounds/chance.py. The mask is read off through an identity: with W = 0, A = B = I and s = 1 the
output for x = 1 is the mask.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.conformance.laws import battery
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES, np_dtype, pick, st
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array

SHAPES = ((512, 128), (256, 256), (128, 384), (2048, 32), (1000, 33), (24, 256), (8192, 4))
SHARES = (0.5, 0.1, 0.25, 0.75, 0.9)  # p, one half first and most often
SEED_BITS = 64
TINY = 5  # sixteenths of a step of 1 / 256 and so on that p is: rounded, it would be 0
LEVELS, DEEP = (8, 10, 12), 16  # bits that p may have been rounded to
WANTED = 45  # elements of the rarer kind that are expected there: none at all is an alarm
USUAL = (0.01, 0.05, 0.2, 0.3, 0.5, 0.7, 0.95)
PART = (1024, 64)  # the shape of a mask of which only the ones are counted


def bits(t: Trial, shape: tuple[int, int], p: float, seed: int, dtype: str = "float32") -> Array:
    """Which elements are kept, bool [m,k]."""
    kind = np_dtype(dtype)
    one = np.eye(shape[1], dtype=kind)
    y = t.dropout_forward(np.ones(shape, kind), np.zeros_like(one), one, one, 1.0, p, seed)
    return np.asarray(np.asarray(y) != 0)


def _masks(dtype: str = "float32") -> object:
    return st.builds(
        lambda shape, p, seed: Problem(shape=shape, p=p, seed=seed, dtype=dtype),
        pick(SHAPES),
        pick(SHARES),
        st.integers(0, 2**31 - 1),
    )


def _every_shape(dtype: str, examples: int) -> list[Problem]:
    """With the fairest p, which is seen through best; in one dtype all shapes."""
    shapes = SHAPES if dtype == "float32" else SHAPES[:1]
    return [Problem(shape=shape, p=0.5, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def _independent(t: Trial, p: Problem) -> None:
    found = battery.whole(bits(t, p.shape, p.p, p.seed, p.dtype), 1 - p.p)
    if said := found.broken():
        t.fail(f"the mask of seed {p.seed} with p = {p.p}, {p.shape}: {said}")


def _seeds(dtype: str = "float32") -> object:
    return st.builds(
        lambda shape, low, high: Problem(shape=shape, seed=low + (high << 32), dtype=dtype),
        pick(((64, 64), (48, 96), (256, 16))),
        st.integers(0, 2**31 - 1),
        pick((0, 0, 0x5A5A5A5A)),
    )


def relatives(seed: int, shape: tuple[int, int]) -> dict[str, int]:
    """Seeds that a careless generator confuses with this one: one bit away, a small step away, the
    halves exchanged, and so on. The last ones are none at all, to be refused, or else to count."""
    top = (1 << SEED_BITS) - 1
    found = {f"with bit {b} changed": seed ^ (1 << b) for b in range(SEED_BITS)}
    for step in sorted({1, 2, 3, 4, 32, shape[0], shape[1], shape[0] * shape[1]}):
        found[f"+ {step}"] = seed + step
    found |= {
        "complemented": seed ^ top,
        "complemented in 32 bits": seed ^ 0xFFFFFFFF,
        "negated": (-seed) & top,
        "doubled": 2 * seed & top,
        "halved": seed // 2,
        "with its halves exchanged": (seed >> 32) | ((seed & 0xFFFFFFFF) << 32),
        "with its bytes reversed": int.from_bytes(seed.to_bytes(8, "little"), "big"),
        "modulo 2¹⁶": seed & 0xFFFF,
        "in 32 bits": seed & 0xFFFFFFFF,
        "with its bits reversed": int(f"{seed:064b}"[::-1], 2),
        "0": 0,
        "+ 2⁶⁴": seed + top + 1,
        "with its sign changed": -seed,
    }
    return {name: other for name, other in found.items() if other != seed}


def compared(t: Trial, p: Problem, read: Callable[[int], Array]) -> None:
    """The bits that `read(seed)` gives for the seed against those for each of its relatives."""
    found, refused, seed = battery.Found(), 0, p.seed
    try:
        own = read(seed)
    except Broken:
        if seed < 1 << 31:
            raise
        seed &= 0x7FFFFFFF
        own = read(seed)
    for name, other in relatives(seed, p.shape).items():
        try:
            theirs = read(other)
        except Broken:
            if 0 <= other < 1 << 31:
                raise
            refused += 0 <= other < 1 << SEED_BITS  # it does not take it: refused, not cut off
            continue
        battery.across(found, f"seed {seed} against the one {name}, {other}", own, theirs, 0.5)
    t.note("every seed of 64 bits taken", refused == 0)
    if said := found.broken():
        t.fail(said)


def _related(t: Trial, p: Problem) -> None:
    compared(t, p, lambda seed: bits(t, p.shape, 0.5, seed, p.dtype))


def _shares(dtype: str = "float32") -> object:
    return st.builds(
        lambda seed, deep: Problem(seed=seed, deep=deep, dtype=dtype),
        st.integers(0, 2**31 - 1),
        st.booleans(),
    )


def levels(deep: bool) -> list[tuple[float, int]]:
    """Each p that is tried, with the number of elements that it needs, in whole PARTs."""
    part = PART[0] * PART[1]
    out = [(p, part) for p in USUAL]
    for level in (*LEVELS, *((DEEP,) if deep else ())):
        tiny = TINY * 2.0 ** -(level + 4)
        parts = -(-int(WANTED / tiny) // part)
        out.append((tiny, parts * part))
        if level != DEEP:
            out.append((1 - tiny, parts * part))
    return out


def _rounded(t: Trial, p: Problem) -> None:
    kind, found = np_dtype(p.dtype), battery.Found()
    m, k = PART if kind.itemsize > 2 else (2 * PART[0], PART[1] // 2)  # so that counts are exact
    x, A = np.ones((m, k), kind), np.ones((1, k), kind)
    W, B = np.zeros((1, k), kind), np.ones((1, 1), kind)
    for rate, n in levels(p.deep):
        kept = 0
        for part in range(n // (m * k)):
            y = t.dropout_forward(x, W, A, B, 1.0, rate, p.seed + part)
            kept += int(np.rint(np.asarray(y, np.float64) * (1 - rate)).sum())
        found.add("p = {}", np.array([kept]), n, 1 - rate, np.array([rate]))
    if said := found.broken():
        t.fail(f"the share that is kept is not 1 - p: {said}")


def _nothing_else(dtype: str = "float32") -> object:
    return st.builds(
        lambda shape, p, seed: Problem(shape=shape, p=p, seed=seed, dtype=dtype),
        pick(((40, 32), (64, 17), (3, 64))),
        pick((0.5, 0.1)),
        st.integers(0, 2**31 - 1),
    )


def _of_seed_alone(t: Trial, p: Problem) -> None:
    kept = bits(t, p.shape, p.p, p.seed, p.dtype)
    kind, (m, k) = np_dtype(p.dtype), p.shape
    one, rng = np.eye(k, dtype=kind), np.random.default_rng(p.seed)
    far = 2.0**12 if kind.itemsize == 2 else 2.0**60
    for name, x, scale in (
        ("negative x", -np.ones(p.shape), 1.0),
        ("random x", rng.normal(size=p.shape), -2.0),
        ("growing x", np.arange(1.0, m * k + 1).reshape(m, k), 0.5),
        ("large x", np.full(p.shape, far), 1.0),
        ("small x", np.full(p.shape, 1 / far), 1.0),
        ("x of single elements", np.where(rng.random(p.shape) < 0.1, 1.0, 0.0), 1.0),
    ):
        x = x.astype(kind)
        y = t.dropout_forward(x, np.zeros_like(one), one, one, scale, p.p, p.seed)
        t.expect(f"the mask with {name}", np.asarray(y) != 0, kept & (x != 0))
    if callable(getattr(t.implementation, "dropout_backward", None)):
        ones = np.ones(p.shape, kind)
        dx = t.dropout_backward(ones, ones, np.zeros_like(one), one, one, 1.0, p.p, p.seed)[0]
        t.expect("the mask of the backward pass", np.asarray(dx) != 0, kept)


DROP = ("dropout_forward",)
LAWS = (
    Law(
        "R1",
        "The elements of a mask are kept independently of each other.",
        "pairs at every distance, mirrored, i and i xor d; rows and columns with each other; "
        "patterns of 2 to 8, ones of blocks, rows and columns; rank over GF(2): exact binomials, "
        "together 10⁻¹⁵",
        "neighbours share a draw, a tile is repeated, exactly so many are kept in each row, or "
        "rows and columns are drawn in place of elements",
        ("D-9", "D-2"),
        DROP,
        _masks,
        _independent,
        (),
        dtypes=DTYPES,
        covering=_every_shape,
        cost=10,
    ),
    Law(
        "R2",
        "Masks of different seeds have nothing to do with each other, whichever bits differ.",
        "mask(seed) against mask(seed xor 2ᵇ), b = 0 .. 63, + 1, + 4, + a row, negated, halves "
        "exchanged, ...: equal at half of the places at every shift; from 2³¹ on a seed may be "
        "refused",
        "seed bits are ignored, or a seed's stream is another's, shifted: two runs, or two steps, "
        "drop the same elements",
        ("D-9", "D-5", "R-6"),
        DROP,
        _seeds,
        _related,
        (),
        dtypes=DTYPES,
        cost=20,
    ),
    Law(
        "R3",
        "Elements are dropped with the chance p, also where p or 1 - p is tiny.",
        "p and 1 - p = 5/16 of 1/256, 1/1024, 1/4096, in every second example p = 5/16 of 1/65536; "
        "and usual ones: exact binomials, together 10⁻¹⁵",
        "p is rounded to a byte or a half, is taken for what is kept, or acts twice",
        ("D-10", "D-2"),
        DROP,
        _shares,
        _rounded,
        (),
        dtypes=DTYPES,
        cost=25,
    ),
    Law(
        "R4",
        "The mask depends on the seed and on the shape of x, and on no number in any array.",
        "the elements that are kept of any x are those that are kept of ones, backwards too",
        "the draw is a hash of x, or zeros and signs use up no draw",
        ("D-9", "D-3"),
        DROP,
        _nothing_else,
        _of_seed_alone,
        (),
        dtypes=DTYPES,
        cost=2,
    ),
)
