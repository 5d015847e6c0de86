"""Weights in fewer bits: rounded otherwise than the precision says, or not everywhere the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.rounded import (
    Rounded,
    Rounds,
    as_integers,
    in_groups,
    q4_1,
    q8_0,
    to_bf16,
)
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


class _CutsOff(Rounds):
    def low(self, a: Array) -> Array:
        bits = np.ascontiguousarray(a).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)


@wrong(
    "bf16-cut-off",
    "subtle",
    "Activations become bfloat16 by dropping their lower half.",
    "The upper 16 bits are the quick way to bfloat16; rounding needs one addition more.",
)
class Bf16CutOff(Rounded):
    rounds = _CutsOff


class _NarrowSums(Rounds):
    def product(self, x: Array, M: Array) -> Array:
        total = np.zeros((x.shape[0], M.shape[1]), np.float32)
        for i in range(len(M)):
            total = to_bf16(total + x[:, i : i + 1] * M[i])
        return total


@wrong(
    "bf16-weights-narrow-sums",
    "subtle",
    "With weights in bfloat16 the sums over k are kept in bfloat16 too.",
    "The accumulator takes the weight's dtype; short sums look right.",
)
class Bf16NarrowSums(Rounded):
    rounds = _NarrowSums


class _BackThroughSource(Rounds):
    def lora_backward(self, *arrays: Any, **more: Any) -> Any:
        source = Rounds("fp32")
        source.precision, source.stored = self.precision, np.ascontiguousarray  # type: ignore
        return source.lora_backward(*arrays, **more)


@wrong(
    "quantized-gradient-of-source",
    "subtle",
    "dx goes back through the weight as it was before it was quantized.",
    "The source is still in memory, and the gradient is that of another function than the forward.",
)
class GradientOfSource(Rounded):
    precision = "int8"
    rounds = _BackThroughSource


class _EightBits(Rounds):
    def of_x(self, x: Array) -> Array:
        return as_integers(x, 127)


@wrong(
    "int8-activations-of-8-bits",
    "gross",
    "Activations are rounded to 8 bits where 16 are promised.",
    "The quick kernel for two matrices of 8 bits is used for weight-only quantization.",
)
class EightBitActivations(Rounded):
    precision = "int8"
    rounds = _EightBits


class _OneScale(Rounds):
    def of_x(self, x: Array) -> Array:
        scale = np.abs(x).max(axis=1, keepdims=True, initial=0) / np.float32(32639)
        codes: Array = np.rint(x / np.where(scale > 0, scale, np.float32(1)))
        return (codes * scale).astype(np.float32)


@wrong(
    "int8-one-scale-for-a-row",
    "subtle",
    "All of a row of activations shares one scale.",
    "One outlier takes the digits of every other feature; rows of like numbers look right.",
)
class OneScaleForARow(Rounded):
    precision = "int8"
    rounds = _OneScale


class _StaleScale(Rounds):
    def stored(self, W: Array) -> Array:
        return q8_0(W)

    def product(self, x: Array, M: Array) -> Array:
        def stale(g: Array) -> Array:
            top = np.abs(g).max(axis=2, keepdims=True)
            before = np.concatenate([top[:, :1], top[:, :-1]], axis=1)
            return g * (before / np.where(top > 0, top, np.float32(1)))

        return self._rows(x, in_groups(M.T, stale).T)


@wrong(
    "int8-scale-of-the-group-before",
    "gross",
    "From the second group on, a group of weights is multiplied by the scale of the one before.",
    "The pointer to the scales is moved on after the group in place of before it.",
)
class ScaleOfTheGroupBefore(Rounded):
    precision = "int8"
    rounds = _StaleScale


class _TruncatedCodes(Rounds):
    def stored(self, W: Array) -> Array:
        return q8_0(W, np.trunc)


@wrong(
    "int8-codes-cut-off",
    "subtle",
    "Weights become 8-bit codes by cutting off, not by rounding.",
    "A cast to an integer type cuts off.",
)
class CodesCutOff(Rounded):
    precision = "int8"
    rounds = _TruncatedCodes


class _FlooredCodes(Rounds):
    def stored(self, W: Array) -> Array:
        return q4_1(W, np.floor)


@wrong(
    "int4-codes-cut-off",
    "subtle",
    "4-bit codes above the minimum are cut off, not rounded.",
    "Codes that are never negative look as if no rounding were needed.",
)
class FlooredCodes(Rounded):
    precision = "int4"
    rounds = _FlooredCodes


class _NoMinimum(Rounds):
    def product(self, x: Array, M: Array) -> Array:
        def above(g: Array) -> Array:
            return g - g.min(axis=2, keepdims=True)

        return self._rows(x, in_groups(M.T, above).T)


@wrong(
    "int4-minimum-forgotten",
    "gross",
    "The minimum of each group is left out: only code times scale is multiplied.",
    "Q4_0 has no minimum, and Q4_1 is read with its kernel.",
)
class MinimumForgotten(Rounded):
    precision = "int4"
    rounds = _NoMinimum


class _TwoProducts(Rounds):
    def product(self, x: Array, M: Array) -> Array:
        x1, M1 = to_bf16(x), to_bf16(M)
        return self._rows(x1, M1) + self._rows(x1, to_bf16(M - M1))


@wrong(
    "fp32x3-two-products",
    "subtle",
    "Of the three products of halves, that of x's lower half is left out.",
    "The weights are then good to 16 bits and the activations to 8.",
)
class TwoProducts(Rounded):
    precision = "fp32x3"
    rounds = _TwoProducts
