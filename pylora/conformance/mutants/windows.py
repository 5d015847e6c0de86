"""Windows, layouts and scales of attention, shapes that are none, and the whole block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.types import Array, Attn

Weights = Mapping[str, Array]
Adapters = Mapping[str, LoraTriple]


@wrong(
    "window-one-too-long",
    "subtle",
    "A token sees window + 1 keys: itself, and window before it.",
    "The window is taken for the distance; models disagree about which it is.",
)
class WindowTooLong(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=attn.window + (attn.window > 0))


@wrong(
    "window-one-too-short",
    "subtle",
    "A token sees window - 1 keys, and at least itself.",
    "`<` for `<=` in the mask.",
)
class WindowTooShort(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=max(1, attn.window - 1) if attn.window else 0)


@wrong(
    "window-not-in-backward",
    "subtle",
    "The gradients are those of attention without a window.",
    "The forward kernel has a window, the backward kernel is the older one.",
)
class WindowNotInBackward(Correct):
    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Any:
        return super().attention_backward(dy, x, weights, adapters, replace(shape, window=0))


@wrong(
    "window-of-1-is-none",
    "subtle",
    "A window of 1 is taken for no window.",
    "`if window > 1`.",
)
class WindowOf1(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=0 if attn.window == 1 else attn.window)


@wrong(
    "window-past-64-is-64",
    "subtle",
    "Windows beyond 64 are 64.",
    "Keys are read in a block of 64, the block of the window's first key is left out.",
)
class WindowCapped(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        return replace(attn, window=min(attn.window, 64))


@wrong(
    "interleaved-ignored",
    "gross",
    "Interleaved pairs are turned as half-split ones.",
    "The layout is a field of the file that nobody reads.",
)
class InterleavedIgnored(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        return super()._turned(x, position, replace(shape, rope_layout="half"), inverse)


@wrong(
    "interleaved-in-q-alone",
    "subtle",
    "q is turned in interleaved pairs, k in half-split ones.",
    "One of two calls got the new argument. A head of two elements does not tell.",
)
class InterleavedInQ(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        is_k = x.shape[1] == shape.kv_heads * shape.head_dim and shape.heads != shape.kv_heads
        shape = replace(shape, rope_layout="half") if is_k else shape
        return super()._turned(x, position, shape, inverse)


@wrong(
    "interleaved-backward-half",
    "subtle",
    "The backward pass turns half-split pairs back.",
    "The default of an argument.",
)
class InterleavedBackward(Correct):
    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        shape = replace(shape, rope_layout="half") if inverse else shape
        return super()._turned(x, position, shape, inverse)


@wrong(
    "scores-scaled-twice",
    "gross",
    "Scores are multiplied by the given scale and by 1 / sqrt(head_dim).",
    "The kernel scales by itself.",
)
class ScoresScaledTwice(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        attn = super()._attn(shape)
        given = shape.scale is not None
        return replace(attn, scale=attn.scale * (shape.head_dim**-0.5 if given else 1.0))


@wrong(
    "scores-scale-of-1-is-none",
    "subtle",
    "A scale of 1 is taken for none.",
    "1 was the default of the field.",
)
class ScoresScaleOne(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        return super()._attn(replace(shape, scale=None if shape.scale == 1 else shape.scale))


@wrong(
    "scores-scale-not-in-backward",
    "subtle",
    "The gradients are scaled by 1 / sqrt(head_dim), whatever the scale is.",
    "The scale is an argument of the forward kernel alone.",
)
class ScoresScaleBackward(Correct):
    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Any:
        return super().attention_backward(dy, x, weights, adapters, replace(shape, scale=None))


@wrong(
    "attention-any-lengths",
    "subtle",
    "Lengths that do not add up to the rows are taken: what is left over is zero.",
    "Nobody adds them up.",
)
class AnyLengths(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        total = sum(shape.lengths)
        if total == len(x):
            return super().attention(x, weights, adapters, shape)
        y = np.zeros((len(x), weights["o_proj"].shape[0]), x.dtype)
        rows = np.resize(x, (total, x.shape[1]))
        some = super().attention(rows, weights, adapters, shape)
        y[: min(total, len(x))] = some[: len(x)]
        return y


@wrong(
    "attention-odd-head-left",
    "subtle",
    "Of an odd head the last element is left as it is.",
    "head_dim // 2 pairs.",
)
class OddHead(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        if shape.head_dim % 2 == 0:
            return super().attention(x, weights, adapters, shape)
        return np.zeros((len(x), weights["o_proj"].shape[0]), x.dtype)


@wrong(
    "attention-heads-rounded-down",
    "subtle",
    "Heads that the key heads do not divide are rounded down.",
    "heads // kv_heads.",
)
class HeadsRoundedDown(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        extra = shape.heads % shape.kv_heads
        if not extra:
            return super().attention(x, weights, adapters, shape)
        n = (shape.heads - extra) * shape.head_dim
        cut = {**weights, "q_proj": weights["q_proj"][:n], "o_proj": weights["o_proj"][:, :n]}
        return super().attention(x, cut, {}, replace(shape, heads=shape.heads - extra))


# ---- the whole block -----------------------------------------------------------------------------


@wrong(
    "block-norm-after",
    "gross",
    "The norm stands after attention, not before it.",
    "Post-norm, as in the first transformers.",
)
class NormAfter(Correct):
    def block(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape, eps: float
    ) -> Array:
        ones = {**weights, "norm1": np.ones_like(weights["norm1"])}
        return super().block(x, ones, adapters, shape, eps)


@wrong(
    "block-second-residual-from-x",
    "subtle",
    "The second residual is x, not x₁.",
    "The residual is saved once.",
)
class ResidualFromX(Correct):
    def block(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape, eps: float
    ) -> Array:
        y = self.widen(super().block(x, weights, adapters, shape, eps))
        normed, _ = self.ops.rms_norm_forward(self.widen(x), self.widen(weights["norm1"]), eps)
        return (y - self._attend(normed, weights, adapters, shape)[0]).astype(x.dtype)


@wrong(
    "block-gate-adapter-on-up",
    "subtle",
    "The adapter of gate_proj is applied to up_proj too.",
    "Gate and up are one fused matrix with one adapter.",
)
class GateAdapterOnUp(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        if name == "up_proj" and "gate_proj" in adapters:
            adapters = {**adapters, "up_proj": adapters["gate_proj"]}
        return super()._project(name, x, weights, adapters)


class _OptionsBack(Correct):
    """The backward pass of a shape that is not the one that was asked for."""

    def other(self, shape: AttentionShape) -> AttentionShape:
        return shape

    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        return super().attention_backward(dy, x, weights, adapters, self.other(shape))


@wrong(
    "windowed-backward-without-scale",
    "subtle",
    "With a window the backward pass takes 1 / sqrt(head_dim) for the scale that is given.",
    "The kernel for windows was written before models named a scale.",
)
class WindowedBackWithoutScale(_OptionsBack):
    def other(self, shape: AttentionShape) -> AttentionShape:
        return replace(shape, scale=None) if shape.window and shape.scale else shape


@wrong(
    "interleaved-backward-without-window",
    "subtle",
    "With interleaved pairs the backward pass knows no window.",
    "The path of interleaved pairs calls the function without the argument.",
)
class InterleavedBackWithoutWindow(_OptionsBack):
    def other(self, shape: AttentionShape) -> AttentionShape:
        return replace(shape, window=0) if shape.rope_layout == "interleaved" else shape


@wrong(
    "scaled-and-windowed-in-halves",
    "subtle",
    "With a window and a scale q and k are turned in halves, whatever the layout.",
    "A fast path for one family, whose layout is halves, is taken by what the options are.",
)
class ScaledAndWindowedInHalves(Correct):
    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        if shape.window and shape.scale is not None:
            shape = replace(shape, rope_layout="half")
        return super().attention(x, weights, adapters, shape)
