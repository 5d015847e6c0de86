"""What families of models have besides: LayerNorm, activations, caps, parts of heads, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong("layer-norm-without-bias", "gross", "b is not added.", "The layers that have none.")
class NoBias(Correct):
    def layer_norm(self, x: Array, w: Array, b: Array | None, eps: float) -> Array:
        return super().layer_norm(x, w, None, eps)


@wrong("layer-norm-not-centred", "gross", "The mean stays.", "RMSNorm, with a bias.")
class NotCentred(Correct):
    def layer_norm(self, x: Array, w: Array, b: Array | None, eps: float) -> Array:
        y = self.widen(self.rms_norm(x, w, eps))
        return (y if b is None else y + self.widen(b)).astype(x.dtype)


@wrong("layer-norm-n-minus-1", "subtle", "The variance is over n - 1.", "torch.var's default.")
class Unbiased(Correct):
    def layer_norm(self, x: Array, w: Array, b: Array | None, eps: float) -> Array:
        n = x.shape[1]
        grown = math.sqrt((n - 1) / n) if n > 1 else 1.0
        y = self.widen(super().layer_norm(x, w, None, eps * n / max(n - 1, 1))) * np.float32(grown)
        return (y if b is None else y + self.widen(b)).astype(x.dtype)


@wrong(
    "layer-norm-squares-less-square",
    "subtle",
    "The variance is mean(x²) - mean(x)².",
    "One pass over the row; it cancels where the mean is large.",
)
class OnePass(Correct):
    def layer_norm(self, x: Array, w: Array, b: Array | None, eps: float) -> Array:
        if x.dtype == np.float64 or not x.size:
            return super().layer_norm(x, w, b, eps)
        wide = self.widen(x)
        mean = wide.mean(axis=1, keepdims=True)
        var = np.maximum((wide * wide).mean(axis=1, keepdims=True) - mean * mean, 0)
        y = (wide - mean) / np.sqrt(var + np.float32(eps)) * self.widen(w)
        return (y if b is None else y + self.widen(b)).astype(x.dtype)


class _Gradient(Correct):
    """dx with some of its terms."""

    through_mean = through_deviation = weighted = True

    def layer_norm_backward(self, dy: Array, x: Array, w: Array, eps: float) -> Array:
        wide = self.widen(x)
        if not x.size:
            return x.copy()
        c = wide - wide.mean(axis=1, keepdims=True)
        r = 1 / np.sqrt((c * c).mean(axis=1, keepdims=True) + wide.dtype.type(eps))
        g = self.widen(dy) * (self.widen(w) if self.weighted else 1)
        dx = g - g.mean(axis=1, keepdims=True) if self.through_mean else g
        if self.through_deviation:
            dx = dx - c * r * (g * c * r).mean(axis=1, keepdims=True)
        return (r * dx).astype(x.dtype)


@wrong("layer-norm-gradient-without-mean", "gross", "mean(g) is left out.", "RMSNorm's backward.")
class WithoutMean(_Gradient):
    through_mean = False


@wrong(
    "layer-norm-gradient-without-deviation",
    "gross",
    "n mean(g n) is left out.",
    "The deviation is taken for a constant.",
)
class WithoutDeviation(_Gradient):
    through_deviation = False


@wrong("layer-norm-gradient-without-w", "gross", "dy is not multiplied by w.", "w is 1 at first.")
class WithoutWeight(_Gradient):
    weighted = False


@wrong(
    "gelu-tanh-for-erf",
    "subtle",
    "GELU is by tanh, whichever is named.",
    "They differ by 5e-4 at most.",
)
class TanhForErf(Correct):
    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        return super().activation("gelu_tanh" if kind == "gelu_erf" else kind, x, up)


@wrong("gelu-quick", "subtle", "GELU by tanh is x σ(1.702 x).", "QuickGELU, of CLIP.")
class Quick(Correct):
    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        if kind != "gelu_tanh":
            return super().activation(kind, x, up)
        wide = self.widen(x)
        y = wide * self.ops._sigmoid(wide.dtype.type(1.702) * wide)
        return (y if up is None else y * self.widen(up)).astype(x.dtype)


@wrong("relu-not-squared", "gross", "Squared ReLU is max(x, 0).", "Half of its name is known.")
class NotSquared(Correct):
    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        if kind != "relu2":
            return super().activation(kind, x, up)
        y = np.maximum(self.widen(x), 0)
        return (y if up is None else y * self.widen(up)).astype(x.dtype)


@wrong("activation-of-up", "gross", "up is sent through it, not the gate.", "The other half.")
class OfUp(Correct):
    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        if up is None:
            return super().activation(kind, x, None)
        return super().activation(kind, up, x)


@wrong(
    "gelu-gradient-of-tanh",
    "subtle",
    "The slope is that of GELU by tanh, whichever is named.",
    "One kernel for the backward of both.",
)
class SlopeOfTanh(Correct):
    def activation_backward(
        self, kind: str, dy: Array, x: Array, up: Array | None
    ) -> tuple[Array, Array | None]:
        other = "gelu_tanh" if kind == "gelu_erf" else kind
        dx, _ = super().activation_backward(other, dy, x, up)
        return dx, super().activation_backward(kind, dy, x, up)[1]


@wrong("relu2-slope-half", "gross", "The slope of max(x, 0)² is max(x, 0).", "2 is lost.")
class HalfSlope(Correct):
    def activation_backward(
        self, kind: str, dy: Array, x: Array, up: Array | None
    ) -> tuple[Array, Array | None]:
        dx, dup = super().activation_backward(kind, dy, x, up)
        return (dx * dx.dtype.type(0.5) if kind == "relu2" else dx).astype(x.dtype), dup


@wrong(
    "gelu-slope-overflows",
    "subtle",
    "Beyond 100 the slope of GELU by tanh is NaN.",
    "A sigmoid of 0 times an x³ that has overflowed.",
)
class SlopeOverflows(Correct):
    def activation_backward(
        self, kind: str, dy: Array, x: Array, up: Array | None
    ) -> tuple[Array, Array | None]:
        dx, dup = super().activation_backward(kind, dy, x, up)
        if kind == "gelu_tanh":
            dx = np.where(abs(self.widen(x)) > 100, dx.dtype.type(np.nan), dx).astype(x.dtype)
        return dx, dup


@wrong("cap-cuts", "subtle", "Numbers are cut at the cap.", "clamp, which is a cap as well.")
class Cuts(Correct):
    def soft_cap(self, x: Array, multiplier: float, cap: float) -> Array:
        y = self.widen(super().soft_cap(x, multiplier, 0.0))
        return (np.clip(y, -cap, cap) if cap else y).astype(x.dtype)


@wrong("cap-before-multiplier", "subtle", "The cap comes first.", "The order of the settings.")
class CapFirst(Correct):
    def soft_cap(self, x: Array, multiplier: float, cap: float) -> Array:
        y = self.widen(super().soft_cap(x, 1.0, cap))
        return (y * y.dtype.type(multiplier)).astype(x.dtype)


@wrong("cap-tanh-alone", "gross", "tanh is not multiplied by the cap.", "Half of the formula.")
class TanhAlone(Correct):
    def soft_cap(self, x: Array, multiplier: float, cap: float) -> Array:
        y = self.widen(super().soft_cap(x, multiplier, cap))
        return (y / y.dtype.type(cap) if cap else y).astype(x.dtype)


@wrong("cap-gradient-passes", "subtle", "The cap has no slope.", "It is for inference, is it not.")
class Passes(Correct):
    def soft_cap_backward(self, dy: Array, x: Array, multiplier: float, cap: float) -> Array:
        return super().soft_cap_backward(dy, x, multiplier, 0.0)


@wrong("cap-gradient-unscaled", "gross", "dx lacks the multiplier.", "It is applied elsewhere.")
class Unscaled(Correct):
    def soft_cap_backward(self, dy: Array, x: Array, multiplier: float, cap: float) -> Array:
        dx = self.widen(super().soft_cap_backward(dy, x, multiplier, cap))
        return (dx / dx.dtype.type(multiplier)).astype(x.dtype)


@wrong("cap-gradient-at-x", "subtle", "The slope is 1 - (s x / c)².", "x for y.")
class AtX(Correct):
    def soft_cap_backward(self, dy: Array, x: Array, multiplier: float, cap: float) -> Array:
        if not cap:
            return super().soft_cap_backward(dy, x, multiplier, cap)
        s = np.clip(self.widen(x).astype(np.float64) * multiplier / cap, -1e3, 1e3)
        return (self.widen(dy) * multiplier * (1 - s * s)).astype(x.dtype)


@dataclass(frozen=True)
class _Rotation:
    x: Array
    position: Array
    head_dim: int
    rotary_dim: int
    theta: float
    layout: str
    inverse: bool


class _Part(Correct):
    def rope_part(
        self,
        x: Array,
        position: Array,
        head_dim: int,
        rotary_dim: int,
        theta: float,
        layout: str,
        inverse: bool,
    ) -> Array:
        return self.turn(_Rotation(x, position, head_dim, rotary_dim, theta, layout, inverse))

    def turn(self, r: _Rotation) -> Array:
        raise NotImplementedError

    def right(self, r: _Rotation) -> Array:
        return Correct.rope_part(
            self, r.x, r.position, r.head_dim, r.rotary_dim, r.theta, r.layout, r.inverse
        )


@wrong("rope-part-whole", "gross", "The whole head is rotated.", "The setting is not read.")
class Whole(_Part):
    def turn(self, r: _Rotation) -> Array:
        return self.rope(r.x, r.position, r.head_dim, r.theta, r.layout, r.inverse)


@wrong(
    "rope-part-frequencies-of-the-head",
    "subtle",
    "The frequencies are those of a whole head.",
    "theta^(-2i/D) for theta^(-2i/R).",
)
class OfTheHead(_Part):
    def turn(self, r: _Rotation) -> Array:
        theta = r.theta ** (r.rotary_dim / r.head_dim)
        return self.right(_Rotation(
            r.x, r.position, r.head_dim, r.rotary_dim, theta, r.layout, r.inverse
        ))  # fmt: skip


@wrong("rope-part-last", "gross", "The last R numbers of a head turn.", "The other end.")
class Last(_Part):
    def turn(self, r: _Rotation) -> Array:
        def rolled(x: Array, by: int) -> Array:
            heads = x.reshape(len(x), -1, r.head_dim)
            return np.ascontiguousarray(np.roll(heads, by, axis=2)).reshape(x.shape)

        x = rolled(r.x, r.rotary_dim)
        turned = self.right(_Rotation(
            x, r.position, r.head_dim, r.rotary_dim, r.theta, r.layout, r.inverse
        ))  # fmt: skip
        return rolled(turned, -r.rotary_dim)


class _Frequencies(Correct):
    def rope_frequencies(
        self, rotary_dim: int, theta: float, scaling: Mapping[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        return self.angles(rotary_dim, theta, dict(scaling), length, trained)

    def angles(
        self, R: int, theta: float, scaling: dict[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        raise NotImplementedError


@wrong("rope-scaled-without-factor", "subtle", "cos and sin keep their size.", "mscale is lost.")
class WithoutFactor(_Frequencies):
    def angles(
        self, R: int, theta: float, scaling: dict[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        return Correct.rope_frequencies(self, R, theta, scaling, length, trained)[0], 1.0


@wrong("longrope-short-for-long", "subtle", "The short factors always.", "A short prompt first.")
class ShortForLong(_Frequencies):
    def angles(
        self, R: int, theta: float, scaling: dict[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        length = 1 if scaling["rope_type"] == "longrope" else length
        return Correct.rope_frequencies(self, R, theta, scaling, length, trained)


@wrong("dynamic-by-factor-alone", "subtle", "The base grows by the factor.", "NTK-aware, fixed.")
class ByFactor(_Frequencies):
    def angles(
        self, R: int, theta: float, scaling: dict[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        if scaling["rope_type"] == "dynamic" and length > trained:
            length = 2 * trained - 1
        return Correct.rope_frequencies(self, R, theta, scaling, length, trained)


@wrong("llama3-not-blended", "subtle", "Between the two ends nothing is blended.", "A threshold.")
class NotBlended(_Frequencies):
    def angles(
        self, R: int, theta: float, scaling: dict[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        if scaling["rope_type"] == "llama3":
            scaling["high_freq_factor"] = scaling["low_freq_factor"] + 1e-9
        return Correct.rope_frequencies(self, R, theta, scaling, length, trained)


@wrong("experts-always-normalized", "subtle", "The weights always add up to 1.", "Mixtral's way.")
class Normalized(Correct):
    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        return super().experts(logits, k, True)


@wrong("experts-never-normalized", "subtle", "The weights are shares of all.", "OLMoE's way.")
class NeverNormalized(Correct):
    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        return super().experts(logits, k, False)


@wrong(
    "experts-last-of-equal", "subtle", "Of equal experts the last is chosen.", "argsort()[::-1]."
)
class LastOfEqual(Correct):
    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        turned = super().experts(np.ascontiguousarray(logits[:, ::-1]), k, normalize)
        return np.ascontiguousarray(turned[:, ::-1])


@wrong("experts-one-alone", "gross", "Only the likeliest is chosen.", "argmax.")
class OneAlone(Correct):
    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        return super().experts(logits, 1, normalize)
