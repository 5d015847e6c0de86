"""Biases of B (`lora_bias`): forward, gradients, merging, several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.adapted import WithBias
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong(
    "bias-not-scaled",
    "gross",
    "The bias of B is added without the scale.",
    "It is added where the base's bias is, after the product was scaled.",
)
class NotScaled(Correct):
    def bias_forward(
        self, x: Array, W: Array, A: Array, B: Array, bias_B: Any, scale: float, bias: Any = None
    ) -> Array:
        both = bias_B if bias is None else (bias + bias_B).astype(x.dtype)
        return super().bias_forward(x, W, A, B, None, scale, both)


@wrong(
    "bias-scaled-twice",
    "subtle",
    "The bias of B is scaled twice; at scale 1 one does not see it.",
    "It is scaled when it is loaded, and again with the product.",
)
class ScaledTwice(Correct):
    def bias_forward(
        self, x: Array, W: Array, A: Array, B: Array, bias_B: Any, scale: float, bias: Any = None
    ) -> Array:
        more = (bias_B * bias_B.dtype.type(scale)).astype(bias_B.dtype)
        return super().bias_forward(x, W, A, B, more, scale, bias)


@wrong(
    "bias-scales-the-base-too",
    "gross",
    "The base's bias is scaled with the adapter's.",
    "Both are added up first.",
)
class ScalesTheBase(Correct):
    def bias_forward(
        self, x: Array, W: Array, A: Array, B: Array, bias_B: Any, scale: float, bias: Any = None
    ) -> Array:
        both = bias_B if bias is None else (bias + bias_B).astype(x.dtype)
        return super().bias_forward(x, W, A, B, both, scale)


@wrong(
    "bias-lost-with-zero-B",
    "subtle",
    "Where B is all zeros the bias of B is left out with the product.",
    "The shortcut of a fresh adapter is older than biases of B.",
)
class LostWithZeroB(Correct):
    def bias_forward(
        self, x: Array, W: Array, A: Array, B: Array, bias_B: Any, scale: float, bias: Any = None
    ) -> Array:
        more = bias_B if (np.asarray(B) != 0).any() else None
        return super().bias_forward(x, W, A, B, more, scale, bias)


@wrong(
    "bias-gradient-not-scaled",
    "gross",
    "The gradient of the bias of B lacks the scale.",
    "The gradient of an ordinary bias is the sum of the rows.",
)
class GradientNotScaled(Correct):
    def bias_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, ...]:
        *rest, _ = super().bias_backward(dy, x, W, A, B, bias_B, scale)
        return *rest, self.widen(dy).sum(axis=0).astype(dy.dtype)


@wrong(
    "bias-gradient-mean",
    "subtle",
    "The gradient of the bias of B is the mean over the rows; with one row it is right.",
    "mean for sum.",
)
class GradientMean(Correct):
    def bias_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, ...]:
        *rest, db = super().bias_backward(dy, x, W, A, B, bias_B, scale)
        return *rest, (self.widen(db) / max(1, len(dy))).astype(dy.dtype)


@wrong(
    "bias-gradient-in-16-bits",
    "subtle",
    "The rows of dy are added up in 16 bits.",
    "sum keeps the dtype of what it adds up.",
)
class GradientNarrow(Correct):
    def bias_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, ...]:
        *rest, db = super().bias_backward(dy, x, W, A, B, bias_B, scale)
        if dy.dtype.itemsize == 2:
            total = np.zeros_like(db)
            for row in dy:
                total = total + row
            db = (total * dy.dtype.type(scale)).astype(dy.dtype)
        return *rest, db


@wrong(
    "bias-merge-forgotten",
    "gross",
    "The bias of B is not merged.",
    "Merging knows weights alone.",
)
class MergeForgotten(Correct):
    def bias_merge(
        self, W: Array, bias: Any, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, Array]:
        merged, _ = super().bias_merge(W, bias, A, B, bias_B, scale)
        return merged, np.zeros_like(bias_B) if bias is None else np.array(bias)


@wrong(
    "bias-merge-not-scaled",
    "gross",
    "The bias of B is merged without the scale.",
    "bias += lora_B.bias.",
)
class MergeNotScaled(Correct):
    def bias_merge(
        self, W: Array, bias: Any, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, Array]:
        merged, _ = super().bias_merge(W, bias, A, B, bias_B, scale)
        return merged, super().bias_merge(W, bias, A, B, bias_B, 1.0)[1]


@wrong(
    "bias-merge-no-base-bias",
    "subtle",
    "Where the base has no bias, that of B is dropped.",
    "`if base.bias is not None: base.bias += ...`; most models have none.",
)
class MergeWithoutBase(Correct):
    def bias_merge(
        self, W: Array, bias: Any, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, Array]:
        merged, own = super().bias_merge(W, bias, A, B, bias_B, scale)
        return merged, np.zeros_like(own) if bias is None else own


@wrong(
    "bias-mixed-first-for-all",
    "subtle",
    "In a mixed batch every adapter's rows get the first adapter's bias.",
    "The bias is one argument of the kernel, the matrices are an array of them.",
)
class MixedFirst(Correct):
    def bias_mixed(
        self, x: Array, W: Array, adapters: Sequence[WithBias], rows: Array, bias: Any = None
    ) -> Array:
        adapters = [(A, B, adapters[0][2], s) for A, B, _, s in adapters]
        return super().bias_mixed(x, W, adapters, rows, bias)


@wrong(
    "bias-mixed-base-rows-too",
    "subtle",
    "Rows without an adapter get the last adapter's bias.",
    "biases[-1] is an element in Python.",
)
class MixedBaseToo(Correct):
    def bias_mixed(
        self, x: Array, W: Array, adapters: Sequence[WithBias], rows: Array, bias: Any = None
    ) -> Array:
        y = super().bias_mixed(x, W, adapters, rows, bias)
        none = np.asarray(rows) == -1
        if adapters and adapters[-1][2] is not None and none.any():
            zero = np.zeros_like(adapters[-1][0]), np.zeros_like(adapters[-1][1])
            more = adapters[-1][2], adapters[-1][3]
            y[none] = self.bias_forward(x[none], W, *zero, *more, bias)
        return y


@wrong(
    "bias-mixed-none-is-the-one-before",
    "subtle",
    "An adapter without a bias of B gets that of the adapter before it.",
    "The slot of the biases is not cleared when the next adapter is loaded into it.",
)
class MixedStale(Correct):
    def bias_mixed(
        self, x: Array, W: Array, adapters: Sequence[WithBias], rows: Array, bias: Any = None
    ) -> Array:
        kept: list[WithBias] = []
        last: Array | None = None
        for A, B, more, s in adapters:
            last = more if more is not None else last
            kept.append((A, B, last, s))
        return super().bias_mixed(x, W, kept, rows, bias)


@wrong(
    "bias-stacked-last-scale",
    "subtle",
    "The sum of stacked adapters' biases is scaled by the last one's scale.",
    "Biases are added up first and scaled once.",
)
class StackedLastScale(Correct):
    def bias_stacked(
        self, x: Array, W: Array, adapters: Sequence[WithBias], bias: Any = None
    ) -> Array:
        y = super().bias_stacked(x, W, [(A, B, None, s) for A, B, _, s in adapters], bias)
        given = [more for _, _, more, _ in adapters if more is not None]
        total = sum((self.widen(more) for more in given), np.zeros(W.shape[0]))
        s = adapters[-1][3] if adapters else 0.0
        return (self.widen(y) + s * total).astype(x.dtype)


@wrong(
    "bias-stacked-last-only",
    "gross",
    "Of stacked adapters only the last one's bias counts.",
    "Each assignment replaces the one before.",
)
class StackedLastOnly(Correct):
    def bias_stacked(
        self, x: Array, W: Array, adapters: Sequence[WithBias], bias: Any = None
    ) -> Array:
        last = len(adapters) - 1
        kept = [(A, B, b if i == last else None, s) for i, (A, B, b, s) in enumerate(adapters)]
        return super().bias_stacked(x, W, kept, bias)


@wrong(
    "bias-stacked-base-each-time",
    "subtle",
    "The base's bias is added once for each stacked adapter that has a bias of its own.",
    "Biases are merged pairwise with the base's.",
)
class StackedBaseEachTime(Correct):
    def bias_stacked(
        self, x: Array, W: Array, adapters: Sequence[WithBias], bias: Any = None
    ) -> Array:
        y = self.widen(super().bias_stacked(x, W, adapters, bias))
        for more in [b for _, _, b, _ in adapters if b is not None][1:]:
            y = y if bias is None or more is None else y + self.widen(bias)
        return np.asarray(y).astype(x.dtype)
