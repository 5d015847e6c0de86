"""The scale, the commonest fault between implementations: of a module, of a call."""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong(
    "scale-missing",
    "gross",
    "The update is added without its scale.",
    "A converter copies A and B and forgets that the numbers go with lora_alpha.",
    "NVIDIA/TensorRT-LLM#1477",
)
class ScaleMissing(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, 1.0, bias)


@wrong(
    "scale-alpha",
    "gross",
    "The scale is alpha, not alpha / r.",
    "The layer multiplies by what its constructor calls alpha.",
    "Blaizzy/mlx-vlm#845",
)
class ScaleAlpha(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return alpha


@wrong(
    "scale-rslora-dropped",
    "gross",
    "use_rslora is not looked at: alpha / r where alpha / sqrt(r) is meant.",
    "A loader that is older than rsLoRA reads the file without complaint.",
    "NVIDIA/TensorRT-LLM#1668",
)
class RsloraDropped(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return alpha / r


@wrong(
    "scale-rslora-always",
    "gross",
    "alpha / sqrt(r) whether or not use_rslora is set.",
    "rsLoRA was made the rule, and old adapters are read by it.",
)
class RsloraAlways(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return alpha / math.sqrt(r)


@wrong(
    "scale-integer-division",
    "subtle",
    "alpha / r is an integer division: right while r divides alpha.",
    "A port to a language whose / of two integers is an integer.",
)
class IntegerDivision(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return super().scaling(alpha, r, True) if use_rslora else float(alpha // r)


@wrong(
    "scale-twice",
    "gross",
    "The scale is applied to h and again to the update.",
    "It is folded into A when the file is loaded, and the layer multiplies too.",
)
class ScaleTwice(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, scale * scale, bias)


@wrong(
    "scale-on-base",
    "gross",
    "The whole output is scaled, the base with it.",
    "A misplaced bracket: s (x Wᵀ + h Bᵀ).",
)
class ScaleOnBase(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = self.widen(super().forward(x, W, A, B, 1.0)) * x.real.dtype.type(scale)
        return (y if bias is None else y + self.widen(bias)).astype(x.dtype)


@wrong(
    "scale-zero-is-one",
    "subtle",
    "A scale of 0 counts as not given, and becomes 1.",
    "`scale or 1.0`; an adapter that was turned off is on.",
    "ggml-org/llama.cpp#28674",
)
class ZeroIsOne(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, scale or 1.0, bias)


@wrong(
    "scale-negative-clipped",
    "subtle",
    "A negative scale counts as 0.",
    "A slider's range, enforced in the layer; subtracting an adapter is then not possible.",
)
class NegativeClipped(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, max(scale, 0.0), bias)


@wrong(
    "scale-negative-absolute",
    "subtle",
    "The square root of |scale| goes to A and to B, and the sign is lost.",
    "A negative weight given to both factors cancels: an adapter times -1 is the adapter.",
    "huggingface/peft#3004",
)
class NegativeAbsolute(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, W, A, B, abs(scale), bias)


@wrong(
    "scale-float16",
    "subtle",
    "The scale passes through float16.",
    "It is kept in a tensor of the model's dtype.",
)
class ScaleFloat16(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        with np.errstate(over="ignore"):
            return super().forward(x, W, A, B, float(np.float16(scale)), bias)


@wrong(
    "scale-fast-root",
    "subtle",
    "rsLoRA's root is an approximation with twelve digits of two.",
    "A reciprocal square root instruction without its correction.",
)
class FastRoot(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        exact = super().scaling(alpha, r, use_rslora)
        return exact * (1 + 2.0**-19) if use_rslora else exact


@wrong(
    "scale-half-reciprocal",
    "subtle",
    "The scale is alpha times a reciprocal of r that is kept in float16.",
    "1 / r is computed once, in the model's dtype: right where r is a power of two.",
)
class HalfReciprocal(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        if use_rslora:
            return super().scaling(alpha, r, use_rslora)
        return alpha * float(np.float16(1 / r))


@wrong(
    "scale-alpha-in-bfloat16",
    "subtle",
    "alpha is rounded to bfloat16 before it is divided.",
    "Settings become tensors.",
)
class AlphaInBfloat(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        bits = np.float32(alpha).view(np.uint32) & np.uint32(0xFFFF0000)
        return super().scaling(float(bits.view(np.float32)), r, use_rslora)
