"""Embeddings with an adapter."""

from __future__ import annotations

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.numbers import random
from pylora.types import Array


@wrong(
    "embedding-not-scaled",
    "gross",
    "The adapter of an embedding is not scaled.",
    "The layer for embeddings has its own forward, without the factor.",
)
class NotScaled(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        return super().embedding_forward(ids, W, A, B, 1.0)


@wrong(
    "embedding-ids-in-8-bits",
    "subtle",
    "The adapter's column is that of the id's lowest 8 bits.",
    "The ids are uint8 in the test, and a buffer is made for them.",
)
class EightBits(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        y = super().embedding_forward(ids, W, A, B, scale)
        cut = np.asarray(ids) % 256
        zero = np.zeros_like(W)
        right, wrong_one = (
            super(EightBits, self).embedding_forward(i, zero, A, B, scale) for i in (ids, cut)
        )
        same = (np.asarray(ids) < 256)[:, None]
        return np.where(same, y, y - right + wrong_one).astype(W.dtype)


@wrong(
    "embedding-ids-in-16-bits",
    "subtle",
    "Ids beyond 65535 are cut to 16 bits.",
    "GPT-2's vocabulary fits into 16 bits; today's do not.",
)
class SixteenBits(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        checked = super().embedding_forward(ids, W, A, B, scale)
        if len(W) <= 65536:
            return checked
        return super().embedding_forward(np.asarray(ids) % 65536, W, A, B, scale)


@wrong(
    "embedding-last-column",
    "subtle",
    "The last token of the vocabulary gets the column of the one before it.",
    "A table that is padded to a multiple loses its last row.",
)
class LastColumn(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        A = np.array(A)
        if A.shape[1] > 1:
            A[:, -1] = A[:, -2]
        return super().embedding_forward(ids, W, A, B, scale)


@wrong(
    "embedding-negative-wraps",
    "subtle",
    "A negative id counts from the end.",
    "W[-1] is a row in NumPy: a mask value becomes a token.",
)
class NegativeWraps(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        ids = np.asarray(ids)
        wrapped = np.where(ids < 0, ids + len(W), ids)
        return super().embedding_forward(wrapped, W, A, B, scale)


@wrong(
    "embedding-past-the-end-clamped",
    "subtle",
    "An id past the end becomes the last token.",
    "Gathers on accelerators clamp.",
)
class Clamped(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        ids = np.asarray(ids)
        return super().embedding_forward(np.minimum(ids, len(W) - 1), W, A, B, scale)


@wrong(
    "embedding-adds-zeros",
    "subtle",
    "A fresh adapter's zeros are added, which makes +0 of -0.",
    "A = 0 is multiplied out.",
)
class AddsZeros(Correct):
    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        y = super().embedding_forward(ids, W, A, B, scale)
        return (y + y.dtype.type(0)).astype(W.dtype)


@wrong(
    "embedding-duplicates-lost",
    "subtle",
    "Of equal ids in a batch only the last one's gradient counts.",
    "dA[:, ids] += g adds once for each token in NumPy.",
)
class DuplicatesLost(Correct):
    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        _, dB = super().embedding_backward(dy, ids, W, A, B, scale)
        dA = np.zeros_like(A)
        g = self.widen(dy) @ self.widen(B) * scale
        dA[:, np.asarray(ids)] = g.T.astype(A.dtype)
        return dA, dB


@wrong(
    "embedding-gradient-mean-of-duplicates",
    "subtle",
    "A token's gradient is divided by how often it occurs.",
    "scale_grad_by_freq is on.",
)
class MeanOfDuplicates(Correct):
    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        dA, dB = super().embedding_backward(dy, ids, W, A, B, scale)
        count = np.bincount(np.asarray(ids).astype(np.int64), minlength=A.shape[1])
        return (self.widen(dA) / np.maximum(count, 1)).astype(A.dtype), dB


@wrong(
    "embedding-gradient-padding-token",
    "subtle",
    "Token 0 gets no gradient.",
    "padding_idx = 0.",
)
class PaddingToken(Correct):
    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        dA, dB = super().embedding_backward(dy, ids, W, A, B, scale)
        dA[:, 0] = 0
        return dA, dB


@wrong(
    "embedding-gradient-sums-in-16-bits",
    "subtle",
    "Rows of the same token are added up in 16 bits.",
    "The scatter adds in the dtype of the table.",
)
class NarrowScatter(Correct):
    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        dA, dB = super().embedding_backward(dy, ids, W, A, B, scale)
        if dy.dtype.itemsize == 2:
            g = (self.widen(dy) @ self.widen(B) * np.float32(scale)).astype(dy.dtype)
            dA = np.zeros_like(A)
            for row, t in zip(g, np.asarray(ids)):
                dA[:, t] = dA[:, t] + row
        return dA, dB


@wrong(
    "embedding-gradient-of-W-rows",
    "gross",
    "dB is computed with the rows of W in place of A's columns.",
    "The input of an ordinary module would be the embedding's output.",
)
class RowsOfW(Correct):
    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        dA, dB = super().embedding_backward(dy, ids, W, A, B, scale)
        rows = np.resize(self.widen(W)[np.asarray(ids)], (len(ids), A.shape[0]))
        return dA, (self.widen(dy).T @ rows * scale).astype(B.dtype)


@wrong(
    "embedding-merge-not-scaled",
    "gross",
    "Merging an embedding leaves the scale out.",
    "get_delta_weight of the embedding is another function.",
)
class MergeNotScaled(Correct):
    def embedding_merge(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        return super().embedding_merge(W, A, B, 1.0)


@wrong(
    "embedding-merge-not-transposed",
    "subtle",
    "Where the vocabulary is as large as hidden the product is merged untransposed.",
    "The transpose was put in for shapes that did not fit.",
)
class MergeNotTransposed(Correct):
    def embedding_merge(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        if W.shape[0] != W.shape[1]:
            return super().embedding_merge(W, A, B, scale)
        merged = self.merge(W, A, B, scale)
        return merged[0] if isinstance(merged, tuple) else merged


@wrong(
    "embedding-merge-rounded-first",
    "subtle",
    "The update is rounded to the dtype of W before it is added.",
    "delta.to(weight.dtype).",
)
class MergeRoundedFirst(Correct):
    def embedding_merge(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        delta = scale * (self.widen(B) @ self.widen(A)).T
        return W + delta.astype(W.dtype)


@wrong(
    "embedding-starts-like-a-linear",
    "gross",
    "An embedding's A is Kaiming-uniform and its B zeros, as a linear module's.",
    "One function fills both kinds.",
)
class StartsLikeLinear(Correct):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random_too: bool
    ) -> tuple[Array, Array]:
        return self.init(hidden, vocab, r, seed, "kaiming")


@wrong(
    "embedding-starts-uniform",
    "subtle",
    "An embedding's B is uniform, of the right mean and variance.",
    "rand in place of randn, scaled to fit.",
)
class StartsUniform(Correct):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random_too: bool
    ) -> tuple[Array, Array]:
        A, _ = super().embedding_init(vocab, hidden, r, seed, random_too)
        stream = random.stream("init", "module", "B")
        return A, random.uniform((hidden, r), 3**0.5, seed=seed, stream=stream)


@wrong(
    "embedding-starts-ignoring-false",
    "subtle",
    "init_lora_weights = false leaves an embedding's A at zero.",
    "The flag is read for linear modules alone.",
)
class IgnoresFalse(Correct):
    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random_too: bool
    ) -> tuple[Array, Array]:
        return super().embedding_init(vocab, hidden, r, seed, False)
