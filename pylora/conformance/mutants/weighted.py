"""DoRA done wrong: lengths, forward, gradients, merging."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


def _n(W: Array, A: Array, B: Array, scale: float) -> Array:
    V = W.astype(np.float64) + scale * (B.astype(np.float64) @ A.astype(np.float64))
    return np.asarray(np.sqrt((V * V).sum(axis=1)))


def _ratio(a: Array, b: Array) -> Array:
    return np.asarray(np.where(b == 0, 1, a / np.where(b == 0, 1, b)))


@wrong(
    "dora-lengths-of-the-base",
    "gross",
    "The lengths are those of W's rows, not of W + s B A.",
    "They are computed once, when the adapter is made.",
)
class LengthsOfTheBase(Correct):
    def dora_norm(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        return super().dora_norm(W, A, np.zeros_like(B), scale)


@wrong(
    "dora-lengths-without-the-scale",
    "subtle",
    "The scale is left out of the lengths; at scale 1 one does not see it.",
    "B A is at hand where the lengths are computed, s B A is not.",
)
class LengthsWithoutScale(Correct):
    def dora_norm(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        return super().dora_norm(W, A, B, 1.0)


@wrong(
    "dora-lengths-that-cancel",
    "subtle",
    "The lengths are had from three terms whose sum may be below zero, which is cut to zero.",
    "The quick formula is used for every row.",
)
class LengthsThatCancel(Correct):
    def dora_norm(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        F = W.dtype.type
        s, cross, gram = F(scale), W @ A.T, A @ A.T
        n2 = (W * W).sum(axis=1) + F(2) * s * (B * cross).sum(axis=1)
        n2 = n2 + s * s * (B * (B @ gram)).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(n2, 0))).astype(W.dtype)


@wrong(
    "dora-run-as-lora",
    "gross",
    "The magnitudes are dropped: plain LoRA is run.",
    "A tensor with a name that is not known is passed over.",
)
class RunAsLora(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        return self.forward(x, W, A, B, scale, bias)


@wrong(
    "dora-divided-by-the-bases-lengths",
    "gross",
    "The forward pass divides by the lengths of W's rows.",
    "The norm is kept with the weight, which does not change.",
)
class DividedByTheBases(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        other = m * _ratio(_n(W, A, B, scale), _n(W, A, 0 * B, scale))
        return super().dora_forward(x, W, A, B, other.astype(m.dtype), scale, bias)


@wrong(
    "dora-bias-rescaled",
    "gross",
    "The base's bias is multiplied by m / n, too.",
    "The base layer gives its output with the bias in it.",
)
class BiasRescaled(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        if bias is not None:
            bias = (bias * _ratio(m, _n(W, A, B, scale))).astype(bias.dtype)
        return super().dora_forward(x, W, A, B, m, scale, bias)


@wrong(
    "dora-magnitude-of-its-amount",
    "subtle",
    "A negative magnitude is taken by its amount.",
    "A length is not negative, so somebody wrote abs; a trained one may become so.",
)
class AmountOfMagnitude(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        return super().dora_forward(x, W, A, B, np.abs(m), scale, bias)


@wrong(
    "dora-lengths-plus-epsilon",
    "subtle",
    "A millionth is added to the lengths, so that a fresh adapter is not the base.",
    "A division is made safe.",
)
class LengthsPlusEpsilon(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        n = _n(W, A, B, scale)
        return super().dora_forward(x, W, A, B, (m * (n / (n + 1e-6))).astype(m.dtype), scale, bias)


@wrong(
    "dora-start-in-another-sum",
    "subtle",
    "m starts as lengths that were summed in float32, the quotient has them from float64.",
    "m is made by the array library, n by a kernel.",
)
class StartInAnotherSum(Correct):
    def dora_norm(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        n2 = np.zeros(W.shape[0], W.dtype)
        for column in (W + W.dtype.type(scale) * (B @ A)).T:
            n2 = n2 + column * column
        return np.asarray(np.sqrt(n2))


@wrong(
    "dora-zero-rows-are-nan",
    "subtle",
    "A row of zeros is divided by its length.",
    "0 / 0, as PEFT has it.",
)
class ZeroRowsAreNaN(Correct):
    def dora_forward(
        self, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Any = None
    ) -> Array:
        y = super().dora_forward(x, W, A, B, m, scale, bias)
        y[:, (_n(W, A, B, scale) == 0) & (m == 0)] = np.nan
        return y


@wrong(
    "dora-gradient-through-the-lengths",
    "gross",
    "The lengths are not detached: dB has their part.",
    "Automatic differentiation takes all of the formula.",
)
class ThroughTheLengths(Correct):
    def dora_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB, dm = super().dora_backward(dy, x, W, A, B, m, scale)
        n = _n(W, A, B, scale)
        V = W.astype(np.float64) + scale * (B.astype(np.float64) @ A)
        dn = -dm * _ratio(m.astype(np.float64), n)
        dV = (dn * _ratio(np.ones_like(n), n))[:, None] * V
        return dx, dA, (dB + scale * (dV @ A.T)).astype(dB.dtype), dm


@wrong(
    "dora-gradient-without-the-factor",
    "gross",
    "dA and dB are those of plain LoRA: dy is not multiplied by m / n.",
    "The adapter's backward is reused as it is.",
)
class WithoutTheFactor(Correct):
    def dora_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, _, _, dm = super().dora_backward(dy, x, W, A, B, m, scale)
        _, dA, dB = self.backward(dy, x, W, A, B, scale)[:3]
        return dx, dA, dB, dm


@wrong(
    "dora-magnitude-gradient-undivided",
    "gross",
    "The gradient of m is not divided by the lengths.",
    "dm = sum(dy * v), by analogy with a scale.",
)
class MagnitudeUndivided(Correct):
    def dora_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB, dm = super().dora_backward(dy, x, W, A, B, m, scale)
        return dx, dA, dB, (dm * _n(W, A, B, scale)).astype(dm.dtype)


@wrong(
    "dora-input-gradient-of-the-base",
    "subtle",
    "dx leaves m / n out of the base's part.",
    "The frozen layer's backward is the framework's own.",
)
class InputGradientOfTheBase(Correct):
    def dora_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
    ) -> tuple[Array, ...]:
        dx, dA, dB, dm = super().dora_backward(dy, x, W, A, B, m, scale)
        f = _ratio(m.astype(np.float64), _n(W, A, B, scale)).astype(dy.dtype)
        return (dx + (dy - dy * f) @ W).astype(dx.dtype), dA, dB, dm


@wrong(
    "dora-merged-as-lora",
    "gross",
    "The merge drops the magnitudes.",
    "The merge is older than DoRA.",
)
class MergedAsLora(Correct):
    def dora_merge(self, W: Array, A: Array, B: Array, m: Array, scale: float) -> Any:
        merged, state = super().dora_merge(W, A, B, m, scale)
        return self.merge(W, A, B, scale)[0], state


@wrong(
    "dora-merged-by-the-bases-lengths",
    "gross",
    "The merge divides by the lengths of W's rows.",
    "A kept norm is used.",
)
class MergedByTheBases(Correct):
    def dora_merge(self, W: Array, A: Array, B: Array, m: Array, scale: float) -> Any:
        other = m * _ratio(_n(W, A, B, scale), _n(W, A, 0 * B, scale))
        return super().dora_merge(W, A, B, other.astype(m.dtype), scale)


@wrong(
    "dora-merge-rescales-the-update-alone",
    "subtle",
    "W' = W + m / n s B A.",
    "The adapter's own part is what is thought to be rescaled.",
)
class RescalesTheUpdate(Correct):
    def dora_merge(self, W: Array, A: Array, B: Array, m: Array, scale: float) -> Any:
        _, state = super().dora_merge(W, A, B, m, scale)
        f = _ratio(m.astype(np.float64), _n(W, A, B, scale))[:, None]
        return (W + f * scale * (B.astype(np.float64) @ A)).astype(W.dtype), state


@wrong(
    "dora-unmerge-by-the-merged-lengths",
    "subtle",
    "Unmerging takes the lengths from the merged weight, where they are the magnitudes.",
    "The lengths are computed where they are needed.",
)
class UnmergedByTheMerged(Correct):
    def dora_unmerge(
        self, W: Array, A: Array, B: Array, m: Array, scale: float, state: Any
    ) -> Array:
        n = np.sqrt((W.astype(np.float64) ** 2).sum(axis=1)).astype(np.float32)
        return super().dora_unmerge(W, A, B, m, scale, replace(state, norm=n))


@wrong(
    "dora-unmerge-forgets-the-lengths",
    "gross",
    "Unmerging subtracts s B A and does not divide.",
    "It is plain LoRA's.",
)
class UnmergedAsLora(Correct):
    def dora_unmerge(
        self, W: Array, A: Array, B: Array, m: Array, scale: float, state: Any
    ) -> Array:
        return self.unmerge(W, A, B, scale, replace(state, norm=None))


@wrong(
    "dora-unmerge-without-the-residue",
    "subtle",
    "What rounding lost is not put back.",
    "W' / f - s B A is taken for exact.",
)
class UnmergedWithoutResidue(Correct):
    def dora_unmerge(
        self, W: Array, A: Array, B: Array, m: Array, scale: float, state: Any
    ) -> Array:
        none = replace(state, position=state.position[:0], bits=state.bits[:0])
        return super().dora_unmerge(W, A, B, m, scale, none)
