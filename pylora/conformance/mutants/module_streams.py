"""Masks and initial values of modules that are not as random as they should be, of implementations
that promise no bits, so that nothing but statistics shows it."""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array

Shape = tuple[int, int]
Start = tuple[Array, Array, Array | None]


class _Masks(Correct):
    """Correct masks that promise no bits."""

    bits = False

    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().dropout_mask(shape, p, seed, path, step, row0)

    def dropout_mask(
        self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        return self.mask(shape, p, seed, path, step, row0)


@wrong(
    "module-mask-rows-come-again",
    "subtle",
    "From the 257th row on a module's mask is that of its first rows.",
    "A tile of 256 rows is drawn, and used for each tile of the batch.",
)
class RowsComeAgain(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        kept = super().mask(shape, p, seed, path, step, row0)
        return kept[np.arange(shape[0]) % 256]


@wrong(
    "module-mask-neighbours-share",
    "subtle",
    "Two neighbours of a row are dropped together.",
    "One word of the generator serves two columns.",
)
class NeighboursShare(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        kept = super().mask(shape, p, seed, path, step, row0)
        return kept[:, np.arange(shape[1]) // 2 * 2]


@wrong(
    "module-mask-without-row0",
    "subtle",
    "Each part of a batch drops what the first part drops.",
    "Where the rows start in the batch is not handed on to the generator.",
)
class WithoutRow0(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().mask(shape, p, seed, path, step, 0)


@wrong(
    "module-mask-seed-xor-step",
    "subtle",
    "Step 2 of seed 3 drops what step 3 of seed 2 drops.",
    "The key is the exclusive or of seed and step.",
)
class SeedXorStep(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().mask(shape, p, seed ^ step, path, 1, row0)


@wrong(
    "module-mask-seed-plus-step",
    "subtle",
    "A run of the next seed drops what this one drops a step later.",
    "The generator of a step is seeded with seed + step.",
)
class SeedPlusStep(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().mask(shape, p, (seed + step) % 2**64, path, 1, row0)


@wrong(
    "module-mask-step-behind-path",
    "subtle",
    "q_proj1 at step 2 drops what q_proj drops at step 12.",
    "Path and step are written one behind the other into the key.",
)
class StepBehindPath(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().mask(shape, p, seed, f"{path}{step}", 1, row0)


@wrong(
    "module-mask-row0-in-32-bits",
    "subtle",
    "The number of an element is cut to 32 bits where the rows of a batch start far on.",
    "row0 * k is computed in uint32.",
)
class Row0In32Bits(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        k = max(shape[1], 1)
        return super().mask(shape, p, seed, path, step, row0 * k % 2**32 // k)


@wrong(
    "module-mask-p-in-16-bits",
    "subtle",
    "A p below 2⁻¹⁶ drops nothing in a module.",
    "p is compared with half a word of the generator.",
)
class PIn16Bits(_Masks):
    def mask(self, shape: Shape, p: float, seed: int, path: str, step: int, row0: int) -> Array:
        return super().mask(shape, math.floor(p * 2**16) / 2**16, seed, path, step, row0)


class _Starts(Correct):
    """Correct initial values that promise no bits."""

    bits = False


@wrong(
    "embedding-rows-of-opposite-sign",
    "subtle",
    "Every second row of an embedding's B is the negative of the row before.",
    "Antithetic pairs, which make the mean exact.",
)
class OppositeRows(_Starts):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random: bool
    ) -> tuple[Array, Array]:
        A, B = super().embedding_init(vocab, hidden, r, seed, random)
        B = np.array(B)
        B[1::2] = -B[: hidden // 2 * 2 : 2]
        return A, B


@wrong(
    "embedding-uniform-b",
    "subtle",
    "An embedding's B is uniform, with the normal one's variance.",
    "The initialiser of linear layers is used with another gain.",
)
class UniformEmbedding(_Starts):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random: bool
    ) -> tuple[Array, Array]:
        A, B = super().embedding_init(vocab, hidden, r, seed, random)
        u = np.random.default_rng(seed).random(B.shape)
        return A, (math.sqrt(12) * (u - 0.5)).astype(np.float32)


@wrong(
    "embedding-seed-in-16-bits",
    "subtle",
    "Of an embedding's seed only 16 bits count.",
    "The seed goes through a short.",
)
class EmbeddingSeed16(_Starts):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random: bool
    ) -> tuple[Array, Array]:
        return super().embedding_init(vocab, hidden, r, seed % 2**16, random)


@wrong(
    "module-start-repeats-rows",
    "subtle",
    "Rows of a module's A come again after 16.",
    "A buffer of 16 rows is drawn once and copied.",
)
class RepeatsRows(_Starts):
    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> Start:
        A, B, bias = super().initial(kind, path, d, k, r, seed, method, lora_bias)
        return A[np.arange(r) % 16], B, bias


@wrong(
    "module-start-seed-in-32-bits",
    "subtle",
    "Of the seed of a module's start only the lower half counts.",
    "The seed is an int of the language below.",
)
class StartSeed32(_Starts):
    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> Start:
        seed %= 2**32
        return super().initial(kind, path, d, k, r, seed, method, lora_bias)


@wrong(
    "module-start-b-is-a-backwards",
    "subtle",
    "A module's random B has the signs of its A, from the end on.",
    "Both are cut out of one stream, one from either end.",
)
class BIsABackwards(_Starts):
    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> Start:
        A, B, bias = super().initial(kind, path, d, k, r, seed, method, lora_bias)
        if method == "false" and kind == "linear":
            signs = np.sign(np.resize(A.reshape(-1)[::-1], B.shape))
            B = np.abs(B) * signs.astype(B.dtype)
        return A, B, bias


@wrong(
    "initial-sum-of-twelve",
    "subtle",
    "A normal number is the sum of twelve uniform ones, less 6.",
    "The oldest recipe there is; its kurtosis is off by 0.1.",
)
class SumOfTwelve(_Starts):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        if method == "gaussian":
            u = np.random.default_rng(seed).random((12, r, k)).sum(axis=0) - 6
            A = (u / r).astype(np.float32)
        return A, B


@wrong(
    "initial-logistic-quantile",
    "subtle",
    "Normal numbers come from the quantile function of a logistic distribution that is bent.",
    "A formula with two constants that is right to a percent.",
)
class BentLogistic(_Starts):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        A, B = super().init(d, k, r, seed, method)
        if method == "gaussian":
            z = np.asarray(A, np.float64) * r
            A = ((z + 0.004 * (z**3 - 3 * z)) / r).astype(np.float32)
        return A, B


@wrong(
    "embedding-sum-of-ten",
    "subtle",
    "An embedding's normal numbers are sums of ten uniform ones.",
    "As that of twelve, with another divisor.",
)
class SumOfTen(_Starts):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random: bool
    ) -> tuple[Array, Array]:
        A, B = super().embedding_init(vocab, hidden, r, seed, random)
        u = np.random.default_rng(seed).random((10, *B.shape)).sum(axis=0) - 5
        return A, (u * math.sqrt(12 / 10)).astype(np.float32)
