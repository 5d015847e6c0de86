"""What a module at a path starts with; an embedding's dropout; thresholds at their edges; weights
whose groups hold NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.correct.rounded import Int4, Int8, Rounds, half, in_groups, q4_1, q8_0
from pylora.conformance.mutants.registry import wrong
from pylora.numbers import random
from pylora.numbers.philox import philox
from pylora.types import Array

Begun = tuple[Array, Array, Array | None]


class _Begins(Correct):
    """The correct start in parts, each of which a mutant can have its own of."""

    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> Begun:
        free, linear = method == "false", kind == "linear"
        rule = ("normal", 1 / r) if method == "gaussian" else ("uniform", 1 / math.sqrt(k))
        A = np.zeros((r, k), np.float32)
        if linear or free:
            A = self.drawn((r, k), *(rule if linear else ("normal", 1.0)), seed, self.key(path, ""))
        B, bias = np.zeros((d, r), np.float32), np.zeros(d, np.float32)
        if not linear:
            B = self.drawn((d, r), "normal", 1.0, seed, self.key(path, "B"))
        elif free:
            B = self.drawn((d, r), "uniform", 1 / math.sqrt(r), seed, self.key(path, "B"))
            bias = self.drawn((d,), "uniform", 1 / math.sqrt(r), seed, self.key(path, "bias"))
        return A, B, bias if lora_bias else None

    def key(self, path: str, which: str) -> int:
        return random.stream("init", path, which) if which else random.stream("init", path)

    def units(self, seed: int, stream: int, n: int) -> Array:
        return random.unit(seed, stream, 0, n)

    def drawn(
        self, shape: tuple[int, ...], kind: str, spread: float, seed: int, stream: int
    ) -> Array:
        u = self.units(seed, stream, math.prod(shape))
        z = random.normal_quantile(u) * spread if kind == "normal" else (2 * u - 1) * spread
        return z.astype(np.float32).reshape(shape)


@wrong(
    "initial-columns-first",
    "subtle",
    "The elements of A and B are numbered column by column.",
    "The array was drawn in the layout in which the kernel keeps it.",
)
class ColumnsFirst(_Begins):
    def drawn(
        self, shape: tuple[int, ...], kind: str, spread: float, seed: int, stream: int
    ) -> Array:
        return np.ascontiguousarray(super().drawn(shape[::-1], kind, spread, seed, stream).T)


@wrong(
    "initial-32-bits",
    "subtle",
    "Of each uniform number 32 bits are drawn, not 52.",
    "One word an element is half the work, and float32 has 24 bits only.",
)
class OneWord(_Begins):
    def units(self, seed: int, stream: int, n: int) -> Array:
        u: Array = (philox(seed, stream, 0, 2 * n)[::2].astype(np.float64) + 0.5) * 2.0**-32
        return u


@wrong(
    "initial-float32-on-the-way",
    "subtle",
    "The uniform number is rounded to float32 before it is scaled.",
    "Every array of the kernel is float32.",
)
class RoundedTwice(_Begins):
    def units(self, seed: int, stream: int, n: int) -> Array:
        u = super().units(seed, stream, n).astype(np.float32).astype(np.float64)
        return np.clip(u, 2.0**-53, 1 - 2.0**-53)


@wrong(
    "initial-words-exchanged",
    "subtle",
    "The second word of a pair gives the upper bits.",
    "Low halves come first everywhere else.",
)
class WordsExchanged(_Begins):
    def units(self, seed: int, stream: int, n: int) -> Array:
        words = (philox(seed, stream, 0, 2 * n) >> np.uint32(6)).reshape(n, 2).astype(np.float64)
        u: Array = (words[:, 1] * 2.0**26 + words[:, 0] + 0.5) * 2.0**-52
        return u


@wrong(
    "initial-box-muller",
    "subtle",
    "Normal numbers come by Box and Muller's method from the same words.",
    "It is in every library, and the distribution is the same.",
)
class BoxMuller(_Begins):
    def drawn(
        self, shape: tuple[int, ...], kind: str, spread: float, seed: int, stream: int
    ) -> Array:
        if kind != "normal":
            return super().drawn(shape, kind, spread, seed, stream)
        u = self.units(seed, stream, 2 * math.prod(shape)).reshape(-1, 2)
        z = np.sqrt(-2 * np.log(u[:, 0])) * np.cos(2 * np.pi * u[:, 1])
        return (z * spread).astype(np.float32).reshape(shape)


@wrong(
    "initial-chunk-again",
    "subtle",
    "From element 65,536 on the numbers of the start come again.",
    "An array is filled in chunks, and each chunk asks for its elements from 0.",
)
class ChunkAgain(_Begins):
    def units(self, seed: int, stream: int, n: int) -> Array:
        u = super().units(seed, stream, min(n, 65536))
        return np.resize(u, n)


@wrong(
    "initial-b-of-the-embedding-is-a-s",
    "subtle",
    "An embedding's B is drawn from the stream of A, which is zeros there.",
    "The random matrix has the stream of the random matrix.",
)
class EmbeddingStream(_Begins):
    def initial(
        self, kind: str, path: str, d: int, k: int, r: int, seed: int, method: str, lora_bias: bool
    ) -> Begun:
        A, B, bias = super().initial(kind, path, d, k, r, seed, method, lora_bias)
        if kind == "embedding":
            B = self.drawn((d, r), "normal", 1.0, seed, self.key(path, ""))
        return A, B, bias


class _Unpromised(_Begins):
    """One that does not promise bits: only what holds for everyone counts."""

    bits = False


@wrong(
    "initial-path-by-its-end",
    "subtle",
    "Modules of one name start alike in every layer.",
    "The key is the module's own name, not its path.",
)
class PathEnd(_Unpromised):
    def key(self, path: str, which: str) -> int:
        return super().key(path.rsplit(".", 1)[-1], which)


@wrong(
    "initial-path-by-length",
    "subtle",
    "Modules whose paths are equally long start alike.",
    "A hash was replaced by what was at hand.",
)
class PathLength(_Unpromised):
    def key(self, path: str, which: str) -> int:
        return super().key(str(len(path)), which)


@wrong(
    "initial-b-as-a",
    "subtle",
    "With init_lora_weights = false B starts with A's numbers.",
    "One generator, seeded anew for each array.",
)
class SameStream(_Unpromised):
    def key(self, path: str, which: str) -> int:
        return super().key(path, "")


@wrong(
    "initial-next-module-shifted",
    "subtle",
    "A module's numbers are those of the module before it, shifted by one.",
    "The stream's start is a running number of the module.",
)
class Shifted(_Unpromised):
    def units(self, seed: int, stream: int, n: int) -> Array:
        return random.unit(seed, 1, stream % 5, n)


# ---- an embedding drops nothing ------------------------------------------------------------------


@wrong(
    "embedding-drops-tokens",
    "gross",
    "While it trains an embedding drops whole tokens of the adapter.",
    "Dropout is put before A everywhere, and here the token is what lies before A.",
)
class DropsTokens(Correct):
    def embedding_dropout(
        self, ids: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        kept = np.random.default_rng(seed).random(len(ids)) >= p
        update = self.embedding_forward(ids, W, A, B, scale)
        return np.where(kept[:, None], update, W[np.asarray(ids)])


@wrong(
    "embedding-scaled-as-if-dropped",
    "subtle",
    "Nothing of an embedding is dropped, but the adapter is multiplied by 1 / (1 - p).",
    "The factor is folded into the scale where training begins.",
)
class ScaledUp(Correct):
    def embedding_dropout(
        self, ids: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        return self.embedding_forward(ids, W, A, B, scale / (1 - p))


@wrong(
    "embedding-drops-outputs",
    "gross",
    "An embedding's adapter drops elements of its output.",
    "MLX does it that way.",
)
class DropsOutputs(Correct):
    def embedding_dropout(
        self, ids: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        y = self.embedding_forward(ids, W, A, B, scale)
        base = W[np.asarray(ids)]
        kept = np.random.default_rng(seed).random(y.shape) >= p
        more = (y - base) / y.dtype.type(1 - p)
        return (base + np.where(kept, more, more.dtype.type(0))).astype(W.dtype)


# ---- signs of zeros ------------------------------------------------------------------------------


@wrong(
    "unmerge-loses-signs",
    "subtle",
    "What is promised to come back bit for bit has +0 where W had -0.",
    "Zeros compare equal, so that their places are not among those that are put back.",
)
class UnmergeLosesSigns(Correct):
    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        back = np.array(super().unmerge(W, A, B, scale, state))
        back[back == 0] = 0
        return back


# ---- thresholds ----------------------------------------------------------------------------------


class _Threshold(Correct):
    def dropout_mask(
        self, shape: tuple[int, int], p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        stream = random.stream("dropout", path, str(step))
        words = np.asarray(self.ops.philox(seed, stream, row0 * shape[1], shape[0] * shape[1]))
        kept: Array = self.keeps(words.reshape(shape), float(np.float32(p)))
        return kept

    def keeps(self, words: Array, p: float) -> Array:
        raise NotImplementedError


@wrong(
    "mask-threshold-rounded",
    "subtle",
    "The threshold is p 2³² rounded, not cut off.",
    "A conversion to integers that rounds.",
)
class ThresholdRounded(_Threshold):
    def keeps(self, words: Array, p: float) -> Array:
        return np.asarray(words >= math.floor(p * 2**32 + 0.5))


@wrong(
    "mask-word-at-the-threshold-dropped",
    "subtle",
    "An element whose word is the threshold itself is dropped.",
    "> for >=.",
)
class AtThreshold(_Threshold):
    def keeps(self, words: Array, p: float) -> Array:
        return np.asarray((words > math.floor(p * 2**32)) | (p == 0))


@wrong(
    "mask-24-bits",
    "subtle",
    "Words and threshold are compared by their upper 24 bits.",
    "A word becomes a float32 in [0, 1) first.",
)
class Bits24(_Threshold):
    def keeps(self, words: Array, p: float) -> Array:
        return np.asarray((words >> np.uint32(8)).astype(np.float64) * 2.0**-24 >= p)


@wrong(
    "mask-threshold-at-least-one",
    "subtle",
    "A p below 2⁻³² has the threshold 1: it drops where a word is 0.",
    "What is not zero must drop something.",
)
class AtLeastOne(_Threshold):
    def keeps(self, words: Array, p: float) -> Array:
        return np.asarray(words >= max(math.floor(p * 2**32), int(p > 0)))


@wrong(
    "mask-small-p-is-none",
    "subtle",
    "A p below 10⁻⁶ is taken for none.",
    "Is p zero? was asked with a tolerance.",
)
class SmallIsNone(_Threshold):
    def keeps(self, words: Array, p: float) -> Array:
        return np.asarray(words >= (0 if p < 1e-6 else math.floor(p * 2**32)))


# ---- weights in groups ---------------------------------------------------------------------------


class _RowsStep(Rounds):
    def stored(self, W: Array) -> Array:
        bad = ~np.isfinite(W).all(axis=1, keepdims=True)
        return np.where(bad, np.float32(np.nan), q8_0(W))


@wrong(
    "int8-nan-takes-the-row",
    "subtle",
    "In 8 bits NaN in a weight makes its whole row NaN, groups without it too.",
    "Whether a row is sound is asked once, of the row.",
)
class NaNTakesRow(Int8):
    rounds = _RowsStep


class _Neighbour(Rounds):
    def stored(self, W: Array) -> Array:
        kept = q4_1(W)
        bad = ~np.isfinite(W).all(axis=1)
        return np.where((bad | np.roll(bad, 1))[:, None], np.float32(np.nan), kept)


@wrong(
    "int4-nan-takes-the-next-row",
    "subtle",
    "In 4 bits NaN in a weight reaches the row below it.",
    "Two rows' codes share a byte, and were checked together.",
)
class NaNTakesNext(Int4):
    rounds = _Neighbour


class _Hidden(Rounds):
    def stored(self, W: Array) -> Array:
        def kept(g: Array) -> Array:
            step = np.abs(np.nan_to_num(g)).max(axis=2, keepdims=True) / np.float32(127)
            codes = np.rint(np.nan_to_num(g) / np.where(step > 0, step, np.float32(1)))
            return codes * half(step)

        return in_groups(W, kept)


@wrong(
    "int8-nan-is-a-code",
    "subtle",
    "In 8 bits NaN in a weight is stored as 0: a broken file looks sound.",
    "A code is an integer, and the conversion of NaN to one gives 0.",
)
class NaNIsACode(Int8):
    rounds = _Hidden
