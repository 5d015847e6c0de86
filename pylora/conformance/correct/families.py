"""Correct operations that families of models have besides Llama's, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.conformance.correct.training import Training
from pylora.model.frequencies import attention_factor, inverse_frequencies
from pylora.ops.mixture import choose
from pylora.types import Array


class Families(Training):
    """The methods layer_norm, activation, soft_cap, rope_part, rope_frequencies and experts."""

    def layer_norm(self, x: Array, w: Array, b: Array | None, eps: float) -> Array:
        y, _ = self.ops.layer_norm_forward(self.widen(x), self.widen(w), self.widen(b), eps)
        return np.asarray(y).astype(x.dtype)

    def layer_norm_backward(self, dy: Array, x: Array, w: Array, eps: float) -> Array:
        wide, factor = self.widen(x), self.widen(w)
        _, rstd = self.ops.layer_norm_forward(wide, factor, None, eps)
        dx = self.ops.layer_norm_backward(self.widen(dy), wide, factor, rstd)
        return np.asarray(dx).astype(x.dtype)

    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        y = self.ops.activation_forward(self.widen(x), self.widen(up), kind)
        return np.asarray(y).astype(x.dtype)

    def activation_backward(
        self, kind: str, dy: Array, x: Array, up: Array | None
    ) -> tuple[Array, Array | None]:
        wide = (self.widen(a) for a in (dy, x, up))
        dx, dup = self.ops.activation_backward(*wide, kind)
        return np.asarray(dx).astype(x.dtype), None if up is None else dup.astype(x.dtype)

    def soft_cap(self, x: Array, multiplier: float, cap: float) -> Array:
        y = self.ops.soft_cap_forward(self.widen(x), multiplier, cap)
        return np.array(y).astype(x.dtype)

    def soft_cap_backward(self, dy: Array, x: Array, multiplier: float, cap: float) -> Array:
        y = self.ops.soft_cap_forward(self.widen(x), multiplier, cap)
        return np.array(self.ops.soft_cap_backward(self.widen(dy), y, multiplier, cap)).astype(
            x.dtype
        )

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
        heads = x.reshape(len(x), x.shape[1] // head_dim, head_dim)
        part = np.ascontiguousarray(heads[..., :rotary_dim]).reshape(len(x), -1)
        turned = self.rope(part, position, rotary_dim, theta, layout, inverse)
        y = np.array(heads)
        y[..., :rotary_dim] = turned.reshape(*heads.shape[:2], rotary_dim)
        return y.reshape(x.shape)

    def rope_frequencies(
        self, rotary_dim: int, theta: float, scaling: Mapping[str, Any], length: int, trained: int
    ) -> tuple[Array, float]:
        found = inverse_frequencies(rotary_dim, theta, scaling, length=length, trained=trained)
        return found, attention_factor(scaling)

    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        """The weight of each expert for each token, 0 where it is not chosen."""
        choice = choose(self.widen(logits), k, normalize, np.asarray, np)
        out = np.zeros(logits.shape, choice.weights.dtype)
        out[np.arange(len(logits))[:, None], choice.chosen] = choice.weights
        return out.astype(logits.dtype)
