"""Paths by dtype and by layout: one of several that a method has is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.extras import need


def _bf16(a: Any) -> Any:
    kind = need("ml_dtypes").bfloat16
    return a.dtype == kind


def _summed_in_bf16(x: Any, M: Any) -> Any:
    """x Mᵀ, every partial sum rounded to bfloat16."""
    total = np.zeros((len(x), len(M)), x.dtype)
    for j in range(x.shape[1]):
        total = total + x[:, j : j + 1] * M[:, j][None]
    return total


@wrong(
    "mixed-bfloat16-summed-in-bfloat16",
    "subtle",
    "A mixed batch in bfloat16 is summed in bfloat16.",
    "The path for several adapters is another kernel, whose accumulator has the inputs' type.",
)
class MixedNarrow(Correct):
    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        y = super().forward_mixed(x, W, adapters, rows, bias)
        if _bf16(x):
            none = np.asarray(rows) < 0
            base = _summed_in_bf16(x, W)
            y[none] = (base if bias is None else base + bias)[none]
        return y


@wrong(
    "dropout-bfloat16-summed-in-bfloat16",
    "subtle",
    "With dropout, bfloat16 is summed in bfloat16.",
    "Dropout is a path of training, where nobody looks at the digits.",
)
class DropoutNarrow(Correct):
    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        y = super().dropout_forward(x, W, A, B, scale, p, seed)
        if not _bf16(x):
            return y
        low = super().dropout_forward(x, np.zeros_like(W), A, B, scale, p, seed)
        return _summed_in_bf16(x, W) + low


@wrong(
    "merge-float64-in-float32",
    "subtle",
    "A float64 weight is merged in float32.",
    "The merge converts to the dtype that adapters are kept in.",
)
class MergeNarrow(Correct):
    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        if W.dtype != np.float64:
            return super().merge(W, A, B, scale)
<<<<<<< HEAD
        half = [a.astype(np.float32) for a in (W, A, B)]
        merged, _ = super().merge(half[0], half[1], half[2], scale)
=======
        narrow = [a.astype(np.float32) for a in (W, A, B)]
        merged, _ = super().merge(narrow[0], narrow[1], narrow[2], scale)
>>>>>>> main
        return merged.astype(np.float64), super().merge(W, A, B, scale)[1]


@wrong(
    "stacked-float64-in-float32",
    "subtle",
    "Several adapters at once are computed in float32 for float64, too.",
    "The adapters' matrices are put together in an array whose dtype was left to be the default.",
)
class StackedNarrow(Correct):
    def forward_stacked(self, x: Any, W: Any, adapters: Any, bias: Any = None) -> Any:
        if x.dtype != np.float64:
            return super().forward_stacked(x, W, adapters, bias)
        cut = [(A.astype(np.float32).astype(A.dtype), B, s) for A, B, s in adapters]
        return super().forward_stacked(x, W, cut, bias)


@wrong(
    "loss-bfloat16-accumulated-in-bfloat16",
    "subtle",
    "Gradients of micro-batches in bfloat16 are added up in bfloat16.",
    "The accumulator is made with zeros_like.",
)
class LossNarrow(Correct):
    def loss_gradients(self, batches: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        if not _bf16(A):
            return super().loss_gradients(batches, W, A, B, scale)
        total = sum(int(c.sum()) for _, _, c in batches)
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for x, target, counted in batches:
            for i in np.flatnonzero(counted):
                one = super().loss_gradients(
                    [(x[i : i + 1], target[i : i + 1], np.ones(1, bool))], W, A, B, scale
                )
                dA, dB = dA + one[0] / dA.dtype.type(total), dB + one[1] / dB.dtype.type(total)
        return dA, dB


@wrong(
    "attention-float64-angles-in-float32",
    "subtle",
    "In float64 attention's inputs are rounded to float32.",
    "The tables of angles are float32, and what they are multiplied with becomes it.",
)
class AttentionNarrow(Correct):
    def attention(self, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        if x.dtype == np.float64:
            x = x.astype(np.float32).astype(np.float64)
        return super().attention(x, weights, adapters, shape)


def _flat(a: Any) -> Any:
    """The memory from the first element on, taken for rows one behind the other."""
    if a.flags.c_contiguous or not a.size or min(a.strides) <= 0:
        return a
    if a.flags.f_contiguous:
        return np.ascontiguousarray(a.T).reshape(a.shape)
    return np.ascontiguousarray(a)


@wrong(
    "base-weight-column-major-misread",
    "subtle",
    "A weight that is column-major is read as row-major by the base alone.",
    "The pointer is passed on without its strides on one of two paths.",
)
class BaseMisread(Correct):
    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        return super().base(x, _flat(W), bias)


@wrong(
    "gradient-dy-column-major-misread",
    "subtle",
    "A dy that is column-major is read as row-major.",
    "dy comes from a transposed product in some models, and in no test.",
)
class GradientMisread(Correct):
    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        return super().backward(_flat(dy), x, W, A, B, scale)


@wrong(
    "merge-B-column-major-misread",
    "subtle",
    "A column-major B is merged as if it were row-major.",
    "An adapter that was trained is row-major, one that was read from another file is not.",
)
class MergeMisread(Correct):
    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return super().merge(W, A, _flat(B), scale)


@wrong(
    "mixed-rows-of-stride-2",
    "subtle",
    "Indices of adapters that are every other element of an array are read one after another.",
    "The list of a batch's adapters is a column of a table.",
)
class MixedMisread(Correct):
    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        rows = np.asarray(rows)
        if rows.size > 1 and rows.strides[0] == 2 * rows.itemsize:
            rows = np.concatenate([rows[:1], np.full(len(rows) - 1, -1)])
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "dropout-x-turned-around",
    "subtle",
    "With dropout, an x of negative strides is read from its first address on.",
    "An address and a length describe no array that runs backwards.",
)
class DropoutMisread(Correct):
    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        if x.size and min(x.strides) < 0:
            x = np.ascontiguousarray(x[::-1])
        return super().dropout_forward(x, W, A, B, scale, p, seed)


@wrong(
    "attention-o-weight-column-major",
    "subtle",
    "A column-major weight of the output projection is read as row-major.",
    "Three projections share a function that copies; the fourth has its own.",
)
class AttentionMisread(Correct):
    def attention(self, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        return super().attention(
            x, {**weights, "o_proj": _flat(weights["o_proj"])}, adapters, shape
        )


@wrong(
    "attention-gradient-read-only-refused",
    "subtle",
    "A read-only x is refused by the gradients of attention.",
    "A binding asks for a buffer that it may write to, though it does not.",
)
class AttentionReadOnly(Correct):
    def attention_backward(self, dy: Any, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        if not x.flags.writeable:
            raise ValueError("buffer source array is read-only")
        return super().attention_backward(dy, x, weights, adapters, shape)


@wrong(
    "unmerge-writes-the-merged",
    "subtle",
    "Unmerging a weight that is row-major writes to the array that was given.",
    "Subtracting in place spares a copy.",
)
class UnmergeInPlace(Correct):
    def unmerge(self, W: Any, A: Any, B: Any, scale: float, state: Any = None) -> Any:
        back = super().unmerge(W, A, B, scale, state)
        if W.flags.writeable and W.flags.c_contiguous:
            W[...] = back
        return back
