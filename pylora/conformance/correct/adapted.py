"""Correct embeddings, biases of B, and gradients of a mixed batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.base import Base, by_adapter
from pylora.conformance.protocol import LoraTriple
from pylora.numbers import random
from pylora.types import Array, LoRA

WithBias = tuple[Array, Array, Array | None, float]  # (A, B, bias of B, scale)


class Adapted(Base):
    """The methods backward_mixed, bias_* and embedding_*."""

    # ---- a mixed batch ------------------------------------------------------------------------

    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> tuple[Array, list[tuple[Array, Array]]]:
        """Each adapter's rows by themselves."""
        dx = np.empty(x.shape, x.dtype)
        grads = [(np.zeros_like(A), np.zeros_like(B)) for A, B, _ in adapters]
        packed = self.pack(W)
        for i, mine in by_adapter(rows, len(adapters)).items():
            lora = None if i < 0 else self.as_lora(adapters[i])
            g, inp = self.widen(dy[mine]), self.widen(x[mine])
            part, dA, dB = self._gradients(g, inp, packed, lora)
            dx[mine] = part.astype(x.dtype)
            if i >= 0:
                grads[i] = dA.astype(x.dtype), dB.astype(x.dtype)
        return dx, grads

    def _gradients(self, dy: Array, x: Array, packed: Any, lora: LoRA | None) -> Any:
        """dx, dA, dB of rows that share an adapter."""
        _, h = self.ops.lora_forward(x, packed, None, lora)
        return self.ops.lora_backward(dy, x, h, packed, lora)

    # ---- biases of B --------------------------------------------------------------------------

    def _update(self, x: Array, triple: WithBias) -> Array:
        """s (x Aᵀ Bᵀ + bias_B), wide."""
        A, B, more, scale = triple
        zeros = np.zeros((B.shape[0], A.shape[1]), x.dtype)
        y, _ = self.ops.lora_forward(x, self.pack(zeros), None, self.as_lora((A, B, scale)))
        y = np.asarray(y)
        return y if more is None else y + y.dtype.type(scale) * self.widen(more)

    def bias_forward(
        self,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        bias_B: Array | None,
        scale: float,
        bias: Array | None = None,
    ) -> Array:
        own = self._bias(bias, [(A, B, bias_B, scale)])
        y, _ = self.ops.lora_forward(self.widen(x), self.pack(W), own, self.as_lora((A, B, scale)))
        return np.asarray(y).astype(x.dtype)

    def _bias(self, bias: Array | None, adapters: Sequence[WithBias]) -> Array | None:
        """The base's bias and each adapter's, scaled; None where there is none."""
        total = self.widen(bias)
        for _, _, more, scale in adapters:
            if more is not None:
                wide = self.widen(more)
                scaled = wide.dtype.type(scale) * wide
                total = scaled if total is None else total + scaled
        return None if total is None else np.asarray(total)

    def bias_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, ...]:
        g, inp, packed = self.widen(dy), self.widen(x), self.pack(W)
        dx, dA, dB = self._gradients(g, inp, packed, self.as_lora((A, B, scale)))
        db = g.dtype.type(scale) * g.sum(axis=0)
        return tuple(np.asarray(a).astype(x.dtype) for a in (dx, dA, dB, db))

    def bias_merge(
        self, W: Array, bias: Array | None, A: Array, B: Array, bias_B: Array, scale: float
    ) -> tuple[Array, Array]:
        merged = self.merge(W, A, B, scale)  # type: ignore[attr-defined]
        own = self._bias(bias, [(A, B, bias_B, scale)])
        return merged[0] if isinstance(merged, tuple) else merged, np.asarray(own).astype(W.dtype)

    def bias_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[WithBias],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        y = np.empty((x.shape[0], W.shape[0]), x.dtype)
        packed = self.pack(W)
        for i, mine in by_adapter(rows, len(adapters)).items():
            own = [] if i < 0 else [adapters[i]]
            lora = self.as_lora((own[0][0], own[0][1], own[0][3])) if own else None
            part, _ = self.ops.lora_forward(
                self.widen(x[mine]), packed, self._bias(bias, own), lora
            )
            y[mine] = np.asarray(part).astype(x.dtype)
        return y

    def bias_stacked(
        self, x: Array, W: Array, adapters: Sequence[WithBias], bias: Array | None = None
    ) -> Array:
        inp, own = self.widen(x), self._bias(bias, adapters)
        y, _ = self.ops.lora_forward(inp, self.pack(W), own, None)
        y = np.asarray(y)
        for A, B, _, scale in adapters:
            y = y + self._update(inp, (A, B, None, scale))
        return y.astype(x.dtype)

    # ---- embeddings ---------------------------------------------------------------------------

    def embedding_forward(self, ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
        """W[ids] + s A[:, ids]ᵀ Bᵀ; where A or B is all zeros W[ids] alone."""
        y = self.ops.embedding_forward(np.asarray(ids), self.stored_values(W))
        wide_A, wide_B = self.widen(A), self.widen(B)
        if (wide_A != 0).any() and (wide_B != 0).any():
            h = np.ascontiguousarray(wide_A[:, np.asarray(ids)].T)
            y = y + y.dtype.type(scale) * _rows(h, wide_B.T)
        return np.asarray(y).astype(W.dtype)

    def embedding_backward(
        self, dy: Array, ids: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        ids = np.asarray(ids)
        g, wide_A, wide_B = self.widen(dy), self.widen(A), self.widen(B)
        s = g.dtype.type(scale)
        columns = self.ops.embedding_backward(ids, s * _rows(g, wide_B), A.shape[1])
        h = wide_A[:, ids].T
        dB = s * (g.T @ h)
        return np.ascontiguousarray(columns.T).astype(A.dtype), dB.astype(B.dtype)

    def embedding_merge(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        """W + s (B A)ᵀ: as a linear module whose down is Bᵀ and whose up is Aᵀ."""
        down, up = np.ascontiguousarray(B.T), np.ascontiguousarray(A.T)
        merged: Any = self.merge(W, down, up, scale)  # type: ignore[attr-defined]
        kept: Array = merged[0] if isinstance(merged, tuple) else merged
        return kept

    def embedding_init(
        self, vocab: int, hidden: int, r: int, seed: int, random_too: bool
    ) -> tuple[Array, Array]:
        streams = random.stream("init", "module"), random.stream("init", "module", "B")
        A = np.zeros((r, vocab), np.float32)
        if random_too:
            A = random.normal((r, vocab), 1.0, seed=seed, stream=streams[0])
        return A, random.normal((hidden, r), 1.0, seed=seed, stream=streams[1])

    def embedding_dropout(
        self, ids: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        """A token is no number that could be dropped."""
        return self.embedding_forward(ids, W, A, B, scale)

    def embed(
        self,
        ids: Array,
        W: Array,
        A: Array,
        B: Array,
        scale: float,
        multiplier: float,
        position: Array,
        P: Array | None,
    ) -> Array:
        """The multiplier is of base and adapter; positions are added behind it."""
        y = self.widen(self.embedding_forward(ids, W, A, B, scale))
        y = y * y.dtype.type(multiplier)
        if P is not None:
            y = y + self.widen(P)[position]
        return np.asarray(y).astype(W.dtype)

    # ---- the mask of a module -----------------------------------------------------------------

    def dropout_mask(
        self, shape: tuple[int, int], p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Array:
        """Word e of the stream dropout/<path>/<step> is at least floor(p 2³²): D-7."""
        m, k = shape
        seed, stream = random.check_seed(seed), random.stream("dropout", path, str(step))
        words = self.ops.philox(seed, stream, row0 * k, m * k)
        threshold = math.floor(float(np.float32(p)) * 2**32)
        return np.asarray(words).reshape(shape) >= threshold


def _rows(x: Array, M: Array) -> Array:
    """Each row by itself: its bits must not depend on how many there are."""
    y: Array = np.matmul(np.ascontiguousarray(x)[:, None, :], M)[:, 0]
    return y
