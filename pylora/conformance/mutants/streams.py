"""The random stream of dropout: elements, seeds and chances that hang together."""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.numbers import random
from pylora.numbers.philox import philox
from pylora.reference import Reference
from pylora.types import Array, Drop

STREAM = random.stream("dropout", "module", "0")


def words(n: int, seed: int, first: int = 0) -> Array:
    """n words of 32 bits, as the correct one has them."""
    found: Array = philox(seed, STREAM, first, n)
    return found


class _Ops(Reference):
    """The reference, whose masks the implementation makes."""

    def __init__(self, owner: Masked) -> None:
        super().__init__()
        self.owner = owner

    def dropout(self, x: Array, drop: Drop | None) -> Array:
        if drop is None or drop.p == 0 or not x.size:
            return x
        kept = self.owner.kept(x.shape[0], x.shape[1], drop.p, drop.seed)
        scale = x.dtype.type(1) / (x.dtype.type(1) - x.dtype.type(np.float32(drop.p)))
        return np.where(kept, x * scale, x.dtype.type(0))


class Masked(Correct):
    """Correct but for `draws`, or for `kept`."""

    ops: Reference = Reference()  # of the class: what is looked at to see which laws it concerns

    def __init__(self) -> None:
        self.ops = _Ops(self)

    def draws(self, m: int, k: int, seed: int) -> Array:
        """A word for each element; kept where it is >= p 2³²."""
        return words(m * k, seed).reshape(m, k)

    def kept(self, m: int, k: int, p: float, seed: int) -> Array:
        return np.asarray(self.draws(m, k, seed) >= np.float64(np.float32(p)) * 2**32)


@wrong(
    "mask-neighbours-share",
    "subtle",
    "Every two elements of a row share one draw.",
    "A vector register of 64-bit words was filled with 32-bit draws, each twice.",
)
class NeighboursShare(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return np.repeat(words(m * k, seed)[: (m * k + 1) // 2], 2)[: m * k].reshape(m, k)


@wrong(
    "mask-some-neighbours-share",
    "subtle",
    "The last element of every eight has its neighbour's draw.",
    "A loop unrolled by eight makes seven draws.",
)
class SomeNeighboursShare(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        flat = words(m * k, seed)
        tail = flat[7::8]
        tail[:] = flat[6::8][: tail.size]
        return flat.reshape(m, k)


@wrong(
    "mask-warp-shares",
    "subtle",
    "The 32 lanes of a warp have one draw: whole runs of 32 elements are dropped.",
    "The counter is the warp's number, where it should be the thread's.",
)
class WarpShares(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return np.repeat(words(m * k // 32 + 1, seed), 32)[: m * k].reshape(m, k)


@wrong(
    "mask-tile-repeated",
    "subtle",
    "One tile of 64 rows is used again for each 64 rows.",
    "The generator is seeded anew in each tile, with the seed and the place inside.",
)
class TileRepeated(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return np.tile(words(64 * k, seed).reshape(64, k), (m // 64 + 1, 1))[:m]


@wrong(
    "mask-period",
    "subtle",
    "The stream starts again after 4093 words.",
    "A table of draws, filled once.",
)
class Period(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return np.resize(words(4093, seed), m * k).reshape(m, k)


@wrong(
    "mask-columns-repeated",
    "subtle",
    "Columns from the 16th on repeat the first 16.",
    "The width of a register is taken for the width of the row.",
)
class ColumnsRepeated(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return np.tile(words(m * 16, seed).reshape(m, 16), (1, k // 16 + 1))[:, :k]


@wrong(
    "mask-rows-xor-columns",
    "subtle",
    "An element's draw is its row's, exclusive or its column's.",
    "m + k draws are cheaper than m k, and each looks random.",
)
class RowsXorColumns(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        flat = words(m + k, seed)
        return flat[:m, None] ^ flat[None, m:]


@wrong(
    "mask-symmetric",
    "subtle",
    "Element (i, j) has the draw of (j, i).",
    "The counter is i j + i + j.",
)
class Symmetric(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        i, j = np.arange(m)[:, None], np.arange(k)[None, :]
        low, high = np.minimum(i, j), np.maximum(i, j)
        return words(max(m, k) ** 2, seed)[low * max(m, k) + high]


@wrong(
    "mask-mirrored",
    "subtle",
    "The second half of the elements is the first half backwards.",
    "Two pointers that meet in the middle, one draw for both.",
)
class Mirrored(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        flat = words(m * k, seed)
        half = flat.size // 2
        flat[flat.size - half :] = flat[:half][::-1]
        return flat.reshape(m, k)


@wrong(
    "mask-antithetic",
    "subtle",
    "An element's neighbour has the complement of its draw.",
    "Antithetic draws lower the variance of a sum, which dropout is meant to have.",
)
class Antithetic(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        flat = words(m * k, seed)
        tail = flat[1::2]
        tail[:] = ~flat[::2][: tail.size]
        return flat.reshape(m, k)


@wrong(
    "mask-exactly-so-many",
    "subtle",
    "Of each row exactly the share p is dropped, at places drawn anew.",
    "A permutation of the columns is cut at p k: the share is right, each time.",
)
class ExactlySoMany(Masked):
    def kept(self, m: int, k: int, p: float, seed: int) -> Array:
        order = np.argsort(self.draws(m, k, seed), axis=1).argsort(axis=1)
        return np.asarray(order >= round(p * k))


@wrong(
    "mask-two-of-four",
    "subtle",
    "Of four neighbours as many are dropped as are expected.",
    "Structured sparsity: hardware likes it.",
)
class TwoOfFour(Masked):
    def kept(self, m: int, k: int, p: float, seed: int) -> Array:
        n = m * k
        flat = words(-(-n // 4) * 4, seed).reshape(-1, 4)
        rest = words(len(flat), seed, 1 << 20) / 2**32
        many = np.floor(4 * p + rest)[:, None]
        return (
            np.asarray(flat.argsort(axis=1).argsort(axis=1) >= many).reshape(-1)[:n].reshape(m, k)
        )


@wrong(
    "mask-shift-register",
    "subtle",
    "The bits come from a shift register of 31 bits: x[i] = x[i - 3] xor x[i - 31].",
    "A bit of an old generator is cheap; sums of three of them are not random.",
)
class ShiftRegister(Masked):
    def kept(self, m: int, k: int, p: float, seed: int) -> Array:
        if p != 0.5:
            return super().kept(m, k, p, seed)
        n = m * k
        bits = np.zeros(n + 31, bool)
        bits[:31] = words(31, seed) >> 31
        for i in range(31, n + 31, 3):  # three at a time need none of each other
            bits[i : i + 3] = bits[i - 3 : i][: n + 31 - i] ^ bits[i - 31 : i - 28][: n + 31 - i]
        return bits[31:].reshape(m, k)


class _Reseeded(Masked):
    def reseed(self, seed: int) -> int:
        return seed

    def draws(self, m: int, k: int, seed: int) -> Array:
        return super().draws(m, k, self.reseed(seed))


@wrong(
    "seed-low-bits-only",
    "subtle",
    "Only the low 16 bits of the seed count.",
    "The seed is folded into a counter's field.",
)
class SeedLow(_Reseeded):
    def reseed(self, seed: int) -> int:
        return seed & 0xFFFF


@wrong(
    "seed-high-word-ignored",
    "subtle",
    "The high 32 bits of the seed are cut off.",
    "A C function that takes unsigned int.",
)
class SeedHighWord(_Reseeded):
    def reseed(self, seed: int) -> int:
        return seed & 0xFFFFFFFF


@wrong(
    "seed-lowest-bit-ignored",
    "subtle",
    "The lowest bit of the seed is ignored.",
    "A generator whose state must be odd: seed | 1.",
)
class SeedOdd(_Reseeded):
    def reseed(self, seed: int) -> int:
        return seed | 1


@wrong(
    "seed-halves-folded",
    "subtle",
    "The two halves of the seed are combined by exclusive or.",
    "Sixty-four bits hashed to thirty-two; halves exchanged are the same seed.",
)
class SeedFolded(_Reseeded):
    def reseed(self, seed: int) -> int:
        return (seed ^ (seed >> 32)) & 0xFFFFFFFF


@wrong(
    "seed-is-offset",
    "subtle",
    "The seed is added to the place: seed + 1 has the mask of seed, one element on.",
    "One counter for both.",
)
class SeedIsOffset(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return words(m * k, 7, seed).reshape(m, k)


@wrong(
    "seed-is-block",
    "subtle",
    "The seed is added to the block of four: seed + 1 has the mask of seed, four elements on.",
    "Philox's counter takes the seed where its key should.",
)
class SeedIsBlock(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        return words(m * k, 7, 4 * seed).reshape(m, k)


@wrong(
    "seed-is-row",
    "subtle",
    "Each row is seeded with seed + row: seed + 1 has the mask of seed, one row on.",
    "The seed of a step and that of a row are made by the same sum.",
)
class SeedIsRow(Masked):
    def draws(self, m: int, k: int, seed: int) -> Array:
        rows = [words(k, seed + i) for i in range(m)]
        return np.stack(rows) if rows else np.zeros((0, k), np.uint32)


@wrong(
    "seed-cut-in-silence",
    "subtle",
    "Of a seed that has no place in 64 bits the low 64 are taken.",
    "Arithmetic modulo 2⁶⁴ needs no check; -1 is a seed that many configurations have.",
)
class SeedCut(_Reseeded):
    def drop(self, p: float, seed: int) -> Drop | None:
        return super().drop(p, seed & (2**64 - 1))


class _Rounded(Masked):
    def chance(self, p: float) -> float:
        return p

    def kept(self, m: int, k: int, p: float, seed: int) -> Array:
        return super().kept(m, k, self.chance(p), seed)


@wrong(
    "chance-in-a-byte",
    "subtle",
    "p is rounded to a multiple of 1/256.",
    "One random byte for each element is enough, it seems.",
)
class ChanceByte(_Rounded):
    def chance(self, p: float) -> float:
        return round(p * 256) / 256


@wrong(
    "chance-in-sixteen-bits",
    "subtle",
    "p is rounded down to a multiple of 1/65536.",
    "Two elements for each word.",
)
class ChanceShort(_Rounded):
    def chance(self, p: float) -> float:
        return math.floor(p * 65536) / 65536


@wrong(
    "chance-in-bfloat16",
    "subtle",
    "p is rounded to eight significant bits.",
    "It is kept in a tensor of the model's dtype: 0.9988 is 1.",
)
class ChanceBfloat(_Rounded):
    def chance(self, p: float) -> float:
        bits = np.float32(p).view(np.uint32) + np.uint32(0x8000)
        return float((bits & np.uint32(0xFFFF0000)).view(np.float32))


@wrong(
    "chance-acts-twice",
    "subtle",
    "x is dropped in the layer and again in the adapter, and scaled once: of p² too many are lost.",
    "Two modules that both take care of it, where p is small.",
)
class ChanceTwice(_Rounded):
    def chance(self, p: float) -> float:
        return p * (2 - p) if p < 0.1 else p


@wrong(
    "mask-skips-zeros",
    "subtle",
    "Zeros of x use up no draw.",
    "The mask is made over a compressed x.",
)
class SkipsZeros(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        if not p or (x != 0).all() or not x.size:
            return super().dropout_forward(x, W, A, B, scale, p, seed)
        factor = np.float32(1) / (np.float32(1) - np.float32(p))
        wide = self.widen(x).copy()
        there = wide != 0
        kept = words(int(there.sum()), seed) >= np.float64(np.float32(p)) * 2**32
        wide[there] = np.where(kept, wide[there] * factor, 0)
        h = self.ops._rows(wide, self.widen(A).T)
        y = self.widen(self.base(x, W)) + wide.dtype.type(scale) * self.ops._rows(
            h, self.widen(B).T
        )
        return y.astype(x.dtype)


@wrong(
    "mask-by-sign",
    "subtle",
    "The draw of an element of x is changed by its sign.",
    "The counter is hashed with the bits of x, to need no counter.",
)
class BySign(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        negative = bool(x.size) and bool(self.widen(x).reshape(-1)[0] < 0)
        return super().dropout_forward(x, W, A, B, scale, p, seed ^ negative)
