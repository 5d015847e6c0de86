"""Counts that show whether an array of bits is one of independent fair coins, or of unfair ones.

Each function returns counts with the number of trials and the share of hits that independent bits
have: exact binomials (bounds/chance.py says what follows). `share` is the chance of a 1.

What is looked for in pairs of bits is equality where share = 1/2: equal or not is then a fair coin
for any two different places, and independent of all other disjoint or chained pairs. For other
shares it is that both are the rarer bit; of pairs which form chains (i, i + d, i + 2d, ...) every
second is independent of the others, so the surprise of their sum is halved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from pylora.conformance.bounds import chance
from pylora.types import Array

MOST_ROWS = 512  # rows or columns that are compared with each other
GROUPS = (2, 3, 4, 5, 8)  # bits in a row whose patterns are counted
BLOCKS = (16, 32, 64, 128, 256)  # bits in a row whose ones are counted
WIDTH = 128  # columns of the matrix over GF(2)


@dataclass
class Found:
    """The most surprising of many counts."""

    tests: int = 0
    worst: float = 0.0
    what: str = ""
    said: list[str] = field(default_factory=list)

    def add(
        self,
        what: str,
        count: Array,
        n: Array | int,
        share: Array | float,
        names: Array | None = None,
        halved: bool = False,
    ) -> None:
        """Counts of hits, of n trials each. `what` has {} for the number of the count."""
        count = np.asarray(count)
        nats = chance.surprise(count, n, share) / (2 if halved else 1)
        self.tests += nats.size
        if not nats.size or nats.max() <= self.worst:
            return
        at = int(np.argmax(nats))
        trials, of = (np.broadcast_to(v, count.shape).flat[at] for v in (n, share))
        label = at if names is None else names.flat[at]
        self.worst = float(nats.flat[at])
        self.what = (
            f"{what.format(label)}: {int(count.flat[at])} of {int(trials)}, expected "
            f"{trials * of:.5g}; a chance below e^-{self.worst:.0f}"
        )

    def broken(self) -> str:
        """What is wrong, or nothing."""
        return self.what if self.tests and self.worst >= chance.limit(self.tests) else ""


def whole(bits: Array, share: float) -> Found:
    """All counts of a matrix of bits [m,k]."""
    found, fair = Found(), share == 0.5
    rare = bits if share <= 0.5 else ~bits
    pairs = 0.5 if fair else min(share, 1 - share) ** 2
    flat, lone = bits.reshape(-1), rare.reshape(-1)
    n = flat.size
    found.add("ones{}", np.array([flat.sum()]), n, share, np.array([""]))
    equal, trials = _together(flat if fair else lone, flat if fair else lone, fair)
    distance = np.arange(1, n)
    found.add("bits {} apart, row by row", equal[1:], trials[1:], pairs, distance, halved=not fair)
    _mirrored(found, flat if fair else lone, fair, pairs)
    _dyadic(found, flat if fair else lone, fair, pairs)
    for name, matrix in (("rows", bits), ("columns", bits.T)):
        _against_each_other(
            found, name, matrix if fair else (rare if name == "rows" else rare.T), fair, pairs
        )
    square = (bits if fair else rare)[: bits.shape[1], : bits.shape[0]]
    above = np.triu_indices(len(square), 1)
    hit = _hits(square, square.T, fair)[above]
    said = "the first square of the matrix and its transpose{}"
    found.add(said, np.array([hit.sum()]), hit.size, pairs, np.array([""]))
    for size in GROUPS:
        _patterns(found, flat, size, share)
    for size in BLOCKS:
        if n >= 4 * size:
            ones = flat[: n // size * size].reshape(-1, size).sum(1)
            _counts(found, f"blocks of {size}", ones, size, share)
    _counts(found, "rows", bits.sum(1), bits.shape[1], share)
    _counts(found, "columns", bits.sum(0), bits.shape[0], share)
    if fair and n >= WIDTH * 3 * WIDTH // 2:
        _rank(found, flat)
    return found


def across(found: Found, name: str, one: Array, other: Array, share: float) -> None:
    """Two arrays of bits of the same shape that should know nothing of each other: at every shift,
    forwards and backwards, row by row."""
    if share > 0.5:
        one, other = ~one, ~other
    fair = share == 0.5
    pairs = 0.5 if fair else min(share, 1 - share) ** 2
    n = one.size
    for way, (a, b) in enumerate(((one, other), (other, one))):
        hits, trials = _together(a.reshape(-1), b.reshape(-1), fair)
        sign = "" if way == 0 else "-"
        found.add(
            name + f", shifted by {sign}{{}}", hits[way:], trials[way:], pairs, np.arange(way, n)
        )


def _hits(a: Array, b: Array, fair: bool) -> Array:
    return a == b if fair else a & b


def _together(a: Array, b: Array, fair: bool) -> tuple[Array, Array]:
    """hits[d] of the pairs (a[i], b[i + d]), d = 0 .. n - 1, and how many pairs there are. The FFT
    is exact here: sums of up to 2²⁰ products of small integers are far from 2⁵³ / log n."""
    n = a.size
    size = 1 << (2 * n - 1).bit_length()
    one, other = (2.0 * v - 1 if fair else v.astype(np.float64) for v in (a, b))
    spectrum = np.conj(np.fft.rfft(one, size)) * np.fft.rfft(other, size)
    sums = np.rint(np.fft.irfft(spectrum, size)[:n])
    trials = n - np.arange(n)
    return ((trials + sums) / 2 if fair else sums), trials


def _mirrored(found: Found, flat: Array, fair: bool, pairs: float) -> None:
    """Pairs (i, s - i), i < s - i, for every s."""
    n = flat.size
    v = 2.0 * flat - 1 if fair else flat.astype(np.float64)
    size = 1 << (2 * n - 1).bit_length()
    sums = np.rint(np.fft.irfft(np.fft.rfft(v, size) ** 2, size)[: 2 * n - 1])
    s = np.arange(2 * n - 1)
    own = np.where(s % 2 == 0, (v * v)[s // 2], 0.0)  # i = s - i is no pair
    trials = (np.minimum(s, 2 * n - 2 - s) + 1) // 2
    sums = (sums - own) / 2
    found.add("bits at i and {} - i", (trials + sums) / 2 if fair else sums, trials, pairs)


def _dyadic(found: Found, flat: Array, fair: bool, pairs: float) -> None:
    """Pairs (i, i xor d) for every d, of the largest power of two of elements: by Walsh and
    Hadamard's transform."""
    n = 1 << (flat.size.bit_length() - 1)
    v = 2.0 * flat[:n] - 1 if fair else flat[:n].astype(np.float64)
    sums = np.rint(_walsh(_walsh(v) ** 2) / n)[1:] / 2
    trials = n // 2
    hits = (trials + sums) / 2 if fair else sums
    found.add("bits at i and i xor {}", hits, trials, pairs, np.arange(1, n))


def _walsh(v: Array) -> Array:
    v, step = v.copy(), 1
    while step < v.size:
        pair = v.reshape(-1, 2, step)
        v = np.stack((pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]), axis=1).reshape(-1)
        step *= 2
    return v


def _against_each_other(found: Found, name: str, a: Array, fair: bool, pairs: float) -> None:
    """Every two rows of a matrix, and neighbours, at the same place."""
    rows, k = a.shape
    if rows < 2 or not k:
        return
    a = a[:MOST_ROWS]
    v = (2 * a.astype(np.float32) - 1) if fair else a.astype(np.float32)
    gram = v @ v.T  # whole numbers below 2²⁴: exact
    i, j = np.triu_indices(len(a), 1)
    hits = (k + gram[i, j]) / 2 if fair else gram[i, j]
    found.add(f"{name} {{}} with each other", hits, k, pairs, i * 10000 + j)
    if not fair:
        ones, chance = v.sum(1), np.sqrt(pairs)
        differ = ones[i] + ones[j] - 2 * hits
        said = f"{name} {{}}, where they differ"
        found.add(said, differ, k, 2 * chance * (1 - chance), i * 10000 + j)


def _patterns(found: Found, flat: Array, size: int, share: float) -> None:
    """Each pattern of `size` bits in a row, at multiples of it."""
    groups = flat[: flat.size // size * size].reshape(-1, size)
    number = groups @ (1 << np.arange(size))
    ones = np.array([int(p).bit_count() for p in range(1 << size)])
    counts = np.bincount(number, minlength=1 << size)
    shares = share**ones * (1 - share) ** (size - ones)
    found.add(f"pattern {{}} of {size} bits in a row", counts, len(groups), shares)


def _counts(found: Found, name: str, ones: Array, size: int, share: float) -> None:
    """How many of the groups have each number of ones, and at most each number."""
    cells = binomial(size, share)
    counts = np.bincount(ones, minlength=size + 1)
    found.add(f"{name} with {{}} ones", counts, ones.size, cells)
    below = np.clip(np.cumsum(cells)[:-1], 0, 1)
    found.add(f"{name} with at most {{}} ones", np.cumsum(counts)[:-1], ones.size, below)


@lru_cache(maxsize=256)
def binomial(n: int, share: float) -> Array:
    """The chances of 0 .. n ones."""
    steps = np.arange(1, n + 1)
    logs = np.concatenate(([0.0], np.cumsum(np.log((n - steps + 1) / steps))))
    k = np.arange(n + 1)
    return np.exp(logs + k * np.log(share) + (n - k) * np.log1p(-share))


def _rank(found: Found, flat: Array) -> None:
    """The rank over GF(2) of the bits as a matrix of WIDTH columns: of R rows of fair coins it is
    below WIDTH with a chance of at most 2^(WIDTH - R): each of 2^WIDTH - 1 sums of columns is zero
    with the chance 2^-R."""
    rows = min(flat.size // WIDTH, 3 * WIDTH)
    basis: dict[int, int] = {}
    for row in np.packbits(flat[: rows * WIDTH].reshape(rows, WIDTH), axis=1):
        value = int.from_bytes(row.tobytes(), "big")
        while value:
            top = value.bit_length()
            if top not in basis:
                basis[top] = value
                break
            value ^= basis[top]
    found.tests += 1
    nats = (rows - WIDTH) * float(np.log(2))
    if len(basis) < WIDTH and nats > found.worst:
        found.worst = nats
        found.what = (
            f"the bits as a matrix of {rows} rows have rank {len(basis)} of {WIDTH} over GF(2)"
        )
