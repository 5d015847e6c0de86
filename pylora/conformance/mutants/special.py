"""NaN and infinity hidden or spread, results that are held back, and a B that is taken for zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Batch, Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.reference import Reference
from pylora.types import Array, Attn, Seqs

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


# ---- several adapters, dropout, losses -----------------------------------------------------------


@wrong(
    "mixed-fresh-decides-for-all",
    "subtle",
    "In a mixed batch nothing is left out unless every adapter's B is zero.",
    "One launch for all adapters, and one flag for the launch.",
)
class FreshDecidesForAll(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        y = super().forward_mixed(x, W, adapters, rows, bias)
        if not any((B != 0).any() for _, B, _ in adapters):
            return y
        for i, (A, B, s) in enumerate(adapters):
            mine = np.asarray(rows) == i
            if not (B != 0).any():
                h = self.ops._rows(self.widen(x[mine]), self.widen(A).T)
                update = h.dtype.type(s) * self.ops._rows(h, self.widen(B).T)
                y[mine] = (self.widen(y[mine]) + update).astype(y.dtype)
        return y


@wrong(
    "mixed-first-b-decides",
    "subtle",
    "In a mixed batch all adapters are left out where the first one's B is zero.",
    "`adapters[0].is_fresh`, from the time when there was one.",
)
class FirstBDecides(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        if adapters and not (adapters[0][1] != 0).any():
            rows = np.where(np.asarray(rows) >= len(adapters), rows, -1)
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "mixed-nan-is-base",
    "subtle",
    "In a mixed batch rows that come out as NaN are given the base's result.",
    "One user's broken adapter must not fail the batch; nobody tells the user.",
)
class MixedNanIsBase(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        y = super().forward_mixed(x, W, adapters, rows, bias)
        odd = ~np.isfinite(self.widen(y)).all(axis=1) & (np.asarray(rows) >= 0)
        y[odd] = self.base(x[odd], W, bias)
        return y


@wrong(
    "stacked-nan-left-out",
    "subtle",
    "Of stacked adapters those with NaN or infinity are left out.",
    "A filter of what cannot be right, without a word.",
)
class StackedNanLeftOut(Correct):
    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        sound = [t for t in adapters if all(np.isfinite(self.widen(a)).all() for a in t[:2])]
        return super().forward_stacked(x, W, sound, bias)


@wrong(
    "dropout-cleans-x",
    "subtle",
    "In training NaN and infinity in x become 0.",
    "Only where there is dropout: evaluation, where it was looked for, shows it.",
)
class DropoutCleansX(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        x = np.where(np.isfinite(self.widen(x)), x, x.dtype.type(0))
        return super().dropout_forward(x, W, A, B, scale, p, seed)


@wrong(
    "dropout-backward-cleans",
    "subtle",
    "In training NaN in dy becomes 0.",
    "As in mixed precision, where a scaler decides about it; here nothing does.",
)
class DropoutBackwardCleans(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Grads:
        if p:
            dy = np.where(np.isfinite(self.widen(dy)), dy, dy.dtype.type(0))
        return super().dropout_backward(dy, x, W, A, B, scale, p, seed)


@wrong(
    "dropout-mixes-rows",
    "subtle",
    "In training rows pass through a product with the identity: NaN reaches every row.",
    "Gathering the tokens that are not padded, by a matrix of zeros and ones.",
)
class DropoutMixesRows(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        wide = self.widen(x)
        with np.errstate(all="ignore"):
            x = (np.eye(len(x), dtype=wide.dtype) @ wide).astype(x.dtype)
        return super().dropout_forward(x, W, A, B, scale, p, seed)


@wrong(
    "uncounted-times-zero",
    "subtle",
    "Rows that are not counted are multiplied by zero: NaN for a target that is not there.",
    "loss * mask. The kit's own implementation had this fault, and no law asked.",
)
class UncountedTimesZero(Correct):
    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        dA, dB = super().loss_gradients(batches, W, A, B, scale)
        left = [np.asarray(y)[~c.astype(bool)] for _, y, c in batches]
        leak: Any = sum((self.widen(y).sum() * 0 for y in left), start=0.0)
        return (self.widen(dA) + leak).astype(A.dtype), (self.widen(dB) + leak).astype(B.dtype)


# ---- attention -----------------------------------------------------------------------------------


class _MaskTimesZero(Reference):
    """All scores are computed, and masked shares are multiplied by zero."""

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        o, lse = super().attention_forward(q, k, v, seqs, attn, dtype)
        with np.errstate(all="ignore"):
            return o + (v.sum() * 0).astype(o.dtype), lse


@wrong(
    "attention-mask-times-zero",
    "subtle",
    "Masked shares are multiplied by zero: NaN in a later token, or another sequence, reaches all.",
    "The mask is a factor. Finite numbers never show it.",
)
class MaskTimesZero(Correct):
    ops = _MaskTimesZero()


class _NanRowIsZero(Reference):
    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        o, lse = super().attention_forward(q, k, v, seqs, attn, dtype)
        return finite_or(o), lse


@wrong(
    "attention-nan-row-is-zero",
    "subtle",
    "A row of attention that comes out as NaN becomes 0.",
    "Rows that are masked altogether are 0 / 0, and are cleaned; so is everything else.",
)
class NanRowIsZero(Correct):
    ops = _NanRowIsZero()


class _BackwardTimesZero(Reference):
    def attention_backward(self, do: Array, *rest: Any, **more: Any) -> tuple[Array, Array, Array]:
        dq, dk, dv = super().attention_backward(do, *rest, **more)
        with np.errstate(all="ignore"):
            return dq, dk + (do.sum() * 0).astype(dk.dtype), dv


@wrong(
    "attention-backward-mask-times-zero",
    "subtle",
    "On the way back masked shares are multiplied by zero: NaN in dy reaches every token.",
    "The backward pass recomputes the scores, with the mask as a factor.",
)
class BackwardTimesZero(Correct):
    ops = _BackwardTimesZero()
