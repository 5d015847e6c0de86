"""Correct operations of a transformer and of training, one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.base import Base
from pylora.reference import IGNORE
from pylora.types import AdamW, Array


class Training(Base):
    """The methods rms_norm, swiglu, rope, cross_entropy, adamw, clip and adapter_step."""

    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        y, _ = self.ops.rms_norm_forward(self.widen(x), self.widen(w), eps)
        return np.asarray(y).astype(x.dtype)

    def swiglu(self, gate: Array, up: Array) -> Array:
        y = self.ops.swiglu_forward(self.widen(gate), self.widen(up))
        return np.asarray(y).astype(gate.dtype)

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        wide = (self.widen(a) for a in (dy, gate, up))
        dgate, dup = self.ops.swiglu_backward(*wide)
        return np.asarray(dgate).astype(gate.dtype), np.asarray(dup).astype(gate.dtype)

    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        wide, D = self.widen(x), head_dim
        table = np.outer(np.asarray(position), theta ** (-np.arange(0, D, 2) / D))
        cos, sin = np.cos(table).astype(wide.dtype), np.sin(table).astype(wide.dtype)
        row = np.arange(len(x), dtype=np.int64)
        y = self.ops.rope(wide, cos, sin, row, D, layout=layout, inverse=inverse)
        return np.asarray(y).astype(x.dtype)

    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """nll of each row, and the gradient of the mean over the counted ones."""
        wide, labels = self.widen(logits), np.asarray(labels)
        counted = labels != IGNORE
        weight = np.full(len(labels), 1 / max(1, int(counted.sum()))).astype(wide.dtype)
        nll, _, grad = self.ops.cross_entropy(wide, labels, weight)
        return np.asarray(nll).astype(logits.dtype), np.asarray(grad).astype(logits.dtype)

    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        p, m, v = (np.array(a, order="C") for a in (p, m, v))
        self.ops.adamw_step(p, np.ascontiguousarray(g), m, v, o)
        return p, m, v

    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        """All by the same factor, of the norm of all together."""
        norm = math.sqrt(sum(self.ops.sum_squares(self.widen(g)) for g in grads))
        factor = min(1.0, limit / norm) if norm > 0 else 1.0
        return [self.scaled(g, factor) for g in grads]

    def scaled(self, g: Array, factor: float) -> Array:
        """g itself where nothing is to be clipped."""
        wide: Any = self.widen(g)
        return g.copy() if factor == 1 else (wide * wide.dtype.type(factor)).astype(g.dtype)

    def rates(self, name: str, lr: float, decay: float, ratio: float) -> tuple[float, float]:
        """The rate and the decay of A, B or the bias of B: B is faster, the bias does not decay."""
        return (lr * ratio if name == "B" else lr), (0.0 if name == "bias" else decay)

    def adapter_step(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        lr: float,
        weight_decay: float,
        lora_plus_ratio: float,
    ) -> dict[str, Array]:
        """Each array at its own rate and decay, moments from zero."""
        out = {}
        for name, p in params.items():
            rate, decay = self.rates(name, lr, weight_decay, lora_plus_ratio)
            zeros = np.zeros_like(p)
            settings = AdamW(lr=rate, step=1, weight_decay=decay)
            out[name] = self.adamw(p, grads[name], zeros, zeros, settings)[0]
        return out
