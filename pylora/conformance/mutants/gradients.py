"""The backward pass without dropout, and sums of gradients over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.conformance.correct.plain import Batch, Correct
from pylora.conformance.mutants.numerics import to_bfloat16
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong(
    "da-scale-missing",
    "gross",
    "dA lacks the scale.",
    "The scale is applied where the update is added, and the chain rule is written from h on.",
)
class DaScaleMissing(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, _, dB = super().backward(dy, x, W, A, B, scale)
        return dx, super().backward(dy, x, W, A, B, 1.0)[1], dB


@wrong(
    "db-scale-missing",
    "gross",
    "dB lacks the scale.",
    "h is saved unscaled for the backward pass, where it is taken for scaled.",
)
class DbScaleMissing(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, _ = super().backward(dy, x, W, A, B, scale)
        return dx, dA, super().backward(dy, x, W, A, B, 1.0)[2]


@wrong(
    "dx-scale-missing",
    "gross",
    "The adapter's part of dx lacks the scale.",
    "Right in the last layer's dA and dB, wrong in every gradient below it.",
)
class DxScaleMissing(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        _, dA, dB = super().backward(dy, x, W, A, B, scale)
        return super().backward(dy, x, W, A, B, 1.0)[0], dA, dB


@wrong(
    "dx-without-adapter",
    "gross",
    "dx is that of the base alone.",
    "The adapter's branch is detached from the graph below it; one layer trains well.",
)
class DxWithoutAdapter(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        _, dA, dB = super().backward(dy, x, W, A, B, scale)
        return super().backward(dy, x, W, A, B * 0, scale)[0], dA, dB


@wrong(
    "gradient-leaks-into-w",
    "gross",
    "W gets a gradient: dyᵀ x.",
    "The base's parameters were not frozen; the file with the adapter is no longer enough.",
)
class LeaksIntoW(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dW = self.widen(dy).T @ self.widen(x)
        return (*super().backward(dy, x, W, A, B, scale), dW.astype(x.dtype))


@wrong(
    "gradient-sign-of-negative-scale",
    "subtle",
    "With a negative scale the gradients have the wrong sign.",
    "|scale| was split between the two factors.",
)
class SignOfNegativeScale(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        return super().backward(dy, x, W, A, B, abs(scale))


@wrong(
    "gradient-mean-over-rows",
    "gross",
    "dA and dB are divided by the number of rows.",
    "dy carries the mean of the loss already.",
)
class MeanOverRows(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        rows = max(x.shape[0], 1)
        return (
            dx,
            (self.widen(dA) / rows).astype(dA.dtype),
            (self.widen(dB) / rows).astype(dB.dtype),
        )


@wrong(
    "gradient-last-row-missing",
    "subtle",
    "The last row of an odd number of rows is not in dA and dB.",
    "A loop unrolled by two without its remainder.",
)
class LastRowMissing(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        even = x.shape[0] // 2 * 2
        dx = super().backward(dy, x, W, A, B, scale)[0]
        return (dx, *super().backward(dy[:even], x[:even], W, A, B, scale)[1:3])


@wrong(
    "backward-skipped-where-b-zero",
    "subtle",
    "With B = 0 the adapter's backward pass is skipped, dB too: training never starts.",
    "The short cut that is right for the forward pass is taken in the backward pass.",
)
class SkippedWhereBZero(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return dx, dA, dB if self.widen(B).any() else dB * 0


@wrong(
    "gradient-nan-from-no-rows",
    "subtle",
    "With no rows, dA and dB are NaN.",
    "0 / 0: an expert or an adapter that got no token in this step.",
)
class NanFromNoRows(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        if x.shape[0]:
            return dx, dA, dB
        nan = dA.dtype.type("nan")
        return dx, np.full_like(dA, nan), np.full_like(dB, nan)


@wrong(
    "dy-overwritten",
    "subtle",
    "The backward pass scales dy in the caller's buffer.",
    "Another branch of the graph reads the same dy afterwards.",
)
class DyOverwritten(Correct):
    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        grads = super().backward(dy, x, W, A, B, scale)
        if dy.flags.writeable:
            with np.errstate(all="ignore"):
                dy[...] = (self.widen(dy) * self.widen(dy).dtype.type(scale)).astype(dy.dtype)
        return grads


@wrong(
    "accumulation-mean-of-means",
    "gross",
    "Each micro-batch's mean counts the same, however many rows it has.",
    "Gradient accumulation divided by the number of steps instead of the number of tokens.",
    "ml-explore/mlx-lm#1544",
)
class MeanOfMeans(Correct):
    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        parts = [super(MeanOfMeans, self).loss_gradients([b], W, A, B, scale) for b in batches]
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for gA, gB in parts:
            dA, dB = dA + gA / len(parts), dB + gB / len(parts)
        return dA.astype(A.dtype), dB.astype(B.dtype)


@wrong(
    "accumulation-counts-padding",
    "gross",
    "The mean is over all rows, those that do not count included.",
    "The denominator is the shape of the labels.",
)
class CountsPadding(Correct):
    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        counted = sum(int(c.sum()) for _, _, c in batches)
        rows = sum(c.size for _, _, c in batches)
        dA, dB = super().loss_gradients(batches, W, A, B, scale)
        share = counted / max(rows, 1)
        return (dA * share).astype(A.dtype), (dB * share).astype(B.dtype)


@wrong(
    "accumulation-overwrites",
    "gross",
    "Only the last micro-batch's gradient is kept.",
    "= where += was meant.",
)
class Overwrites(Correct):
    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        empty = [(x, y, np.zeros_like(counted)) for x, y, counted in batches[:-1]]
        total = sum(int(c.sum()) for _, _, c in batches)
        last = int(batches[-1][2].sum()) if batches else 0
        dA, dB = super().loss_gradients([*empty, *batches[-1:]], W, A, B, scale)
        share = last / max(total, 1)
        return (dA * share).astype(A.dtype), (dB * share).astype(B.dtype)


@wrong(
    "accumulation-in-bf16",
    "subtle",
    "The sum over micro-batches is kept in bfloat16.",
    "Gradients have the dtype of the weights; small ones no longer change the sum.",
)
class AccumulationInBf16(Correct):
    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        total = sum(int(c.sum()) for _, _, c in batches)
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for batch in batches:
            share = int(batch[2].sum()) / max(total, 1)
            gA, gB = super().loss_gradients([batch], W, A, B, scale)
            dA = to_bfloat16(dA + gA * share).astype(A.dtype)
            dB = to_bfloat16(dB + gB * share).astype(B.dtype)
        return dA, dB
