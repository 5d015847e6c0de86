"""Initial values that have the right mean and variance, and are wrong as random numbers."""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.numbers import random
from pylora.types import Array

ROOT3 = math.sqrt(3)


class Made(Correct):
    """Correct but for `values`, which are to have variance 1; with Kaiming also within ±sqrt(3)."""

    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        stream = random.stream("init", "module")
        if method == "gaussian":
            return random.normal((r, k), 1.0, seed=seed, stream=stream)
        return random.uniform((r, k), ROOT3, seed=seed, stream=stream)

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        _, B = super().init(d, k, r, seed, method)
        deviation = 1 / r if method == "gaussian" else 1 / math.sqrt(3 * k)
        return (self.values(r, k, seed, method) * deviation).astype(np.float32), B


@wrong(
    "init-uniform-for-gaussian",
    "subtle",
    '"gaussian" is uniform, with the right variance.',
    "One generator, and the deviation is what the test looks at.",
)
class UniformForGaussian(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        return super().values(r, k, seed, "kaiming")


@wrong(
    "init-two-values",
    "subtle",
    "Kaiming's values are plus or minus one number, with the right variance.",
    "Random signs are enough for a projection to keep lengths.",
)
class TwoValues(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        return a if method == "gaussian" else np.sign(a)


@wrong(
    "init-triangle",
    "subtle",
    "Kaiming's values are sums of two, a triangle, cut at the edge of the uniform one.",
    "Two draws are averaged to be more random.",
)
class Triangle(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, 2 * k, seed, method)
        if method == "gaussian":
            return a[:, :k]
        return np.clip((a[:, :k] + a[:, k:]) / math.sqrt(2), -ROOT3, ROOT3)


@wrong(
    "init-tails-cut",
    "subtle",
    '"gaussian" is cut at three deviations.',
    "trunc_normal_ in place of normal_.",
)
class TailsCut(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        return np.clip(a, -3, 3) if method == "gaussian" else a


@wrong(
    "init-twelve-uniforms",
    "subtle",
    '"gaussian" is the sum of four uniform draws.',
    "The central limit theorem, in a hurry.",
)
class SumOfUniforms(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        if method != "gaussian":
            return super().values(r, k, seed, method)
        return super().values(r, 4 * k, seed, "kaiming").reshape(r, k, 4).sum(2) / 2


@wrong(
    "init-off-centre",
    "subtle",
    "The values are from 0 .. 1 with 256 steps, so that their mean is half a step off.",
    "integers / 256 - 0.5.",
)
class OffCentre(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        if method == "gaussian":
            return a
        return (np.floor((a / ROOT3 + 1) * 128) / 128 - 1) * ROOT3


@wrong(
    "init-in-bfloat16",
    "subtle",
    "The values have been through bfloat16.",
    "A is made in the model's dtype and widened for training.",
)
class InBfloat(Made):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = Correct.init(self, d, k, r, seed, method)
        return (A.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32), B


@wrong(
    "init-rows-equal",
    "subtle",
    "All rows of A are the same: the update's rank is 1, whatever r is.",
    "A row is drawn and broadcast.",
)
class RowsEqual(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        return np.repeat(super().values(1, k, seed, method), r, axis=0)


@wrong(
    "init-rows-shifted",
    "subtle",
    "Each row of A is the one above it, shifted by one.",
    "Rows are views of one buffer.",
)
class RowsShifted(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        flat = super().values(1, k + r, seed, method)[0]
        return np.stack([flat[i : i + k] for i in range(r)])


@wrong(
    "init-rows-of-pairs",
    "subtle",
    "Every second row is the one above it, negated.",
    "Antithetic draws, so that h is small at the start.",
)
class RowsOfPairs(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method).copy()
        a[1::2] = -a[::2][: len(a[1::2])]
        return a


@wrong(
    "init-low-rank",
    "subtle",
    '"gaussian": the last row of A is the sum of the others, scaled.',
    "A rank that is one too small shows in no norm.",
)
class LowRank(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        if method == "gaussian" and 2 < r < 40:
            a = np.concatenate([a[:-1], a[:-1].sum(0, keepdims=True) / math.sqrt(r - 1)])
        return a


@wrong(
    "init-outer-product",
    "subtle",
    "Signs and magnitudes of A are those of a column times those of a row.",
    "A matrix from r + k draws.",
)
class OuterProduct(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        signs = np.sign(a[:, :1]) * np.sign(a[:1])
        return np.abs(a) * signs


@wrong(
    "init-magnitudes-repeated",
    "subtle",
    "The magnitudes of a row come again in the next one; signs are drawn.",
    "A table of magnitudes, and a bit for each sign.",
)
class MagnitudesRepeated(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        a = super().values(r, k, seed, method)
        return np.sign(a) * np.abs(a[:1])


@wrong(
    "init-block-repeated",
    "subtle",
    "A block of 1000 values is used again and again.",
    "A buffer of draws that nobody refills.",
)
class BlockRepeated(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        flat = super().values(1, min(1000, r * k), seed, method)[0]
        return np.resize(flat, (r, k))


@wrong(
    "init-neighbours-correlated",
    "subtle",
    "One value in eight has its neighbour's sign.",
    "A vectorised generator whose last lane repeats a bit.",
)
class NeighboursCorrelated(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        flat = super().values(r, k, seed, method).copy().reshape(-1)
        tail = flat[7::8]
        tail[:] = np.abs(tail) * np.sign(flat[6::8][: tail.size])
        return flat.reshape(r, k)


class _InitSeed(Correct):
    def reseed(self, seed: int) -> int:
        return seed

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        return super().init(d, k, r, self.reseed(seed), method)


@wrong(
    "init-seed-in-32-bits",
    "subtle",
    "The seed of the initial values is cut to 32 bits.",
    "PyTorch's generator on a CPU does that.",
)
class InitSeed32(_InitSeed):
    def reseed(self, seed: int) -> int:
        return seed & 0xFFFFFFFF


@wrong(
    "init-seed-bit-ignored",
    "subtle",
    "The 20th bit of the seed is ignored.",
    "A hash that multiplies by an even number loses bits; this is one of them.",
)
class InitSeedBit(_InitSeed):
    def reseed(self, seed: int) -> int:
        return seed & ~(1 << 20)


@wrong(
    "init-seed-is-row",
    "subtle",
    "Row i is seeded with seed + i: seed + 1 starts with the second row of seed.",
    "Rows are made in parallel, each with a seed of its own.",
)
class InitSeedIsRow(Made):
    def values(self, r: int, k: int, seed: int, method: str) -> Array:
        return np.concatenate(
            [super(InitSeedIsRow, self).values(1, k, seed + i, method) for i in range(r)]
        )


@wrong(
    "init-threads-matter",
    "subtle",
    "With several threads each draws its rows from a stream of its own.",
    "Thread-local generators.",
)
class ThreadsMatter(Correct):
    threads = 1

    def set_num_threads(self, n: int) -> None:
        self.threads = n

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return (A if self.threads == 1 else A[::-1].copy()), B


@wrong(
    "init-false-b-normal",
    "subtle",
    "With init_lora_weights = false B is normal, where it should be uniform.",
    "The variance is right.",
)
class FalseNormal(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        if method == "false":
            stream = random.stream("init", "module", "B")
            B = random.normal((d, r), 1 / math.sqrt(3 * r), seed=seed, stream=stream)
        return A, B


@wrong(
    "init-false-b-fan-of-k",
    "subtle",
    "With init_lora_weights = false B has A's bound, 1 / sqrt(k).",
    "The bound is computed once.",
)
class FalseFan(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        return A, B * np.float32(math.sqrt(r / k))


@wrong(
    "init-false-same-stream",
    "subtle",
    "With init_lora_weights = false B is drawn from A's stream: its values are A's.",
    "Each matrix starts a generator with the same seed.",
)
class FalseSameStream(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        if method == "false":
            stream = random.stream("init", "module")
            B = random.uniform((d, r), 1 / math.sqrt(r), seed=seed, stream=stream)
        return A, B
