"""Correct DoRA: lengths, forward, backward, merging and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.base import Base
from pylora.types import Array, LoRA


class Weighted(Base):
    """The methods dora_*."""

    def _magnified(self, A: Array, B: Array, m: Array | None, scale: float) -> LoRA:
        wide = None if m is None else self.widen(m)
        return LoRA(self.widen(A), self.widen(B), scale, magnitude=wide)

    def dora_norm(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        n = self.ops.row_norms(self.pack(W), self._magnified(A, B, None, scale))
        return np.asarray(n).astype(W.dtype)

    def dora_forward(
        self,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        m: Array,
        scale: float,
        bias: Array | None = None,
    ) -> Array:
        lora = self._magnified(A, B, m, scale)
        y, _, _ = self.ops.dora_forward(self.widen(x), self.pack(W), self.widen(bias), lora)
        return np.asarray(y).astype(x.dtype)

    def dora_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
    ) -> tuple[Array, ...]:
        packed, wide = self.pack(W), self.widen(x)
        lora = self._magnified(A, B, m, scale)
        lora = replace(lora, norm=self.ops.row_norms(packed, lora))
        _, h, v = self.ops.dora_forward(wide, packed, None, lora)
        found = self.ops.dora_backward(self.widen(dy), wide, h, v, packed, lora)
        return tuple(np.asarray(g).astype(x.dtype) for g in found)

    def dora_merge(self, W: Array, A: Array, B: Array, m: Array, scale: float) -> tuple[Array, Any]:
        lora = self._magnified(A, B, m, scale)
        merged, state = self.ops.merge(self.as_bits(W), lora, self.file_dtype(W))
        return merged.view(W.dtype), state

    def dora_unmerge(
        self, W: Array, A: Array, B: Array, m: Array, scale: float, state: Any
    ) -> Array:
        lora = self._magnified(A, B, m, scale)
        back: Array = self.ops.unmerge(self.as_bits(W), lora, state, self.file_dtype(W))
        return back.view(W.dtype)
