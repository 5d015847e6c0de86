"""NaN hidden or spread where there are several adapters, dropout, a loss or attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Batch, Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.mutants.special import Grads, finite_or
from pylora.conformance.protocol import LoraTriple
from pylora.reference import Reference
from pylora.types import Array, Attn, Seqs


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
