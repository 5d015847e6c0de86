"""NaN and infinity hidden or spread, results that are held back, and a B that is taken for zero."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array

Grads = tuple[Array, ...]
HALF = 65504.0  # the largest float16


def finite_or(a: Array, value: float = 0.0) -> Array:
    """`a` with NaN replaced."""
    return np.where(np.isnan(a), a.dtype.type(value), a)


def held(a: Array, top: float | None = None) -> Array:
    """`a` held back at a number, the dtype's largest if none is given. NaN stays."""
    if a.dtype.kind == "c":
        return a
    wide = a.astype(np.float64)
    most = float(np.finfo(a.dtype).max) if a.dtype.kind == "f" else 3.3895313892515355e38
    most = most if top is None else top
    return np.clip(wide, -most, most).astype(a.dtype)


# ---- NaN and infinity ----------------------------------------------------------------------------


@wrong(
    "zero-scale-short-cut",
    "subtle",
    "With s = 0 the adapter is left out, and NaN in it with it.",
    "Zero times anything is zero, but for NaN and infinity.",
)
class ZeroScaleShortCut(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if scale == 0:
            return self.base(x, W, bias)
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "zero-ranks-skipped",
    "subtle",
    "Ranks whose column of B is zero are skipped: NaN in their row of A is not seen.",
    "Sparse adapters run faster; the file's checksum of sanity does not.",
)
class ZeroRanksSkipped(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        used = (B != 0).any(axis=0)
        if not used.any():
            return super().forward(x, W, A, B, scale, bias)
        return super().forward(x, W, A[used], B[:, used], scale, bias)


@wrong(
    "update-cleaned",
    "subtle",
    "NaN in the adapter's part of y becomes 0; the base answers in its place.",
    "A broken adapter must not take the server down.",
)
class UpdateCleaned(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y, base = super().forward(x, W, A, B, scale, bias), self.base(x, W, bias)
        return np.where(np.isnan(y), base, y)


@wrong(
    "infinity-becomes-largest",
    "subtle",
    "Infinite elements of y become the largest number.",
    "nan_to_num does that too, and only its first half was thought of.",
)
class InfinityBecomesLargest(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return held(super().forward(x, W, A, B, scale, bias))


@wrong(
    "x-held-at-float16",
    "subtle",
    "x is clipped at ±65504 on its way in, in every dtype.",
    "Transformers clamp activations in float16; the clamp outlived the dtype.",
)
class XHeldAtFloat16(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(held(x, HALF), W, A, B, scale, bias)


@wrong(
    "bfloat16-held-at-float16",
    "subtle",
    "y of bfloat16 is clipped at ±65504, though bfloat16 goes as far as float32.",
    "`if x.dtype is not float32: clamp`.",
)
class Bfloat16Held(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return held(y, HALF) if x.dtype.itemsize == 2 else y


@wrong(
    "gradients-cleaned",
    "subtle",
    "NaN in dA and dB becomes 0.",
    "A skipped step in place of a broken one; the loss never recovers and no one knows why.",
)
class GradientsCleaned(Correct):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return dx, finite_or(dA), finite_or(dB)


@wrong(
    "dx-cleaned",
    "subtle",
    "NaN in dx becomes 0.",
    "The layers below train on as if nothing had been.",
)
class DxCleaned(Correct):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return finite_or(dx), dA, dB


@wrong(
    "gradients-held",
    "subtle",
    "dA and dB are clipped at ±10000 element by element.",
    "A guard against infinity that also takes NaN's neighbours, and large gradients.",
)
class GradientsHeld(Correct):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return dx, held(dA, 1e4), held(dB, 1e4)


@wrong(
    "merge-keeps-w-for-nan",
    "subtle",
    "Where the update is NaN, merging leaves W as it was.",
    "The merged file passes its check for NaN; the adapter would not.",
)
class MergeKeepsW(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        odd = np.isnan(merged) & ~np.isnan(W)
        return np.where(odd, W, merged), (merged, state)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(state[0], A, B, scale, state[1])


@wrong(
    "merge-held-at-largest",
    "subtle",
    "A merged weight beyond the largest number becomes the largest.",
    "Saturating conversion, as integer formats have it.",
)
class MergeHeld(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        return held(merged), (merged, state)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(state[0], A, B, scale, state[1])


@wrong(
    "unmerge-keeps-nan",
    "subtle",
    "Where W' is NaN, unmerging leaves NaN.",
    "What is put back is what rounding lost; NaN is not a rounding.",
)
class UnmergeKeepsNan(Correct):
    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        back = super().unmerge(W, A, B, scale, state)
        return np.where(np.isnan(W), W, back)


@wrong(
    "odd-scale-is-one",
    "subtle",
    "A scale that is no finite number is taken for 1.",
    "alpha is missing in the file, and NaN stands for missing.",
)
class OddScaleIsOne(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, scale if np.isfinite(scale) else 1.0, bias)


# ---- is B zero? ----------------------------------------------------------------------------------


class _Asks(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype.kind != "c" and self.zero(self.widen(B)):
            return self.base(x, W, bias)
        return super().forward(x, W, A, B, scale, bias)

    def zero(self, B: Array) -> bool:
        raise NotImplementedError


@wrong(
    "b-zero-by-first-row",
    "subtle",
    "B is taken for zero where its first row is.",
    "A look at one row tells trained from fresh, in every adapter that was tried.",
)
class ZeroByFirstRow(_Asks):
    def zero(self, B: Array) -> bool:
        return not (B[0] != 0).any()


@wrong(
    "b-zero-but-for-the-last",
    "subtle",
    "The last element of B is not looked at when it is asked whether B is zero.",
    "A loop in blocks without its remainder.",
)
class ZeroButForLast(_Asks):
    def zero(self, B: Array) -> bool:
        return not (B.reshape(-1)[:-1] != 0).any() and B.size > 1


@wrong(
    "b-zero-by-sum",
    "subtle",
    "B is taken for zero where the sum of its elements is.",
    "One reduction in place of a comparison for each element.",
)
class ZeroBySum(_Asks):
    def zero(self, B: Array) -> bool:
        return bool(B.sum() == 0)


@wrong(
    "b-zero-by-tolerance",
    "subtle",
    "B is taken for zero where all of it is below 1e-8.",
    "allclose has an absolute tolerance that nobody asked for.",
)
class ZeroByTolerance(_Asks):
    def zero(self, B: Array) -> bool:
        return bool(np.allclose(B, 0))


@wrong(
    "b-zero-where-nan",
    "subtle",
    "B is zero if no element is below or above zero: NaN is neither.",
    "Comparisons with NaN are false, whichever way they are put.",
)
class ZeroWhereNan(_Asks):
    def zero(self, B: Array) -> bool:
        return not ((B > 0) | (B < 0)).any()


@wrong(
    "b-zero-by-bits",
    "subtle",
    "B is zero if all its bits are: -0.0 is multiplied out.",
    "A scan of memory for bytes that are not zero.",
)
class ZeroByBits(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        if (B != 0).any() or not np.signbit(B.real).any():
            return y
        wide = [self.widen(a) for a in (y, x, A, B)]
        h = self.ops._rows(wide[1], wide[2].T)
        update = wide[0].dtype.type(scale) * self.ops._rows(h, wide[3].T)
        return (wide[0] + update).astype(y.dtype)
