"""Merging one weight, undoing it, and the digest that proves it: thin over a backend's operations.

An embedding is stored [vocab, hidden], so its delta is scale * Aᵀ Bᵀ; of every other module it is
scale * B A. A magnitude (DoRA) goes along; its lengths go with the residue. Biases are not looked
at here.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pylora.ops.protocol import Backend
from pylora.types import LoRA, Residue

Array = np.ndarray[Any, Any]
_ROWS = 1024  # rows of the delta that are looked at together, to bound memory


def merge_weight(
    ops: Backend, W: Array, lora: LoRA, dtype: str = "f32", *, kind: str = "linear"
) -> tuple[Array, Residue]:
    """(W', residue) of one weight as stored: [d, k], or [vocab, hidden] with kind="embedding".

    `dtype` is "f32", "f16" or "bf16" (given as uint16 bits).
    """
    if not _by_columns(lora, kind):
        merged, residue = ops.merge(W, oriented(lora, kind), dtype)
        return merged, residue
    merged, residue = ops.merge(np.ascontiguousarray(W.T), lora, dtype)
    return np.ascontiguousarray(merged.T), _turned(residue, *W.shape)


def unmerge_weight(
    ops: Backend,
    merged: Array,
    lora: LoRA,
    residue: Residue,
    dtype: str = "f32",
    *,
    kind: str = "linear",
) -> Array:
    """The W that `merge_weight` was given, bit for bit."""
    W: Array
    if not _by_columns(lora, kind):
        W = ops.unmerge(merged, oriented(lora, kind), residue, dtype)
        return W
    there = _turned(residue, *merged.shape[::-1])
    W = ops.unmerge(np.ascontiguousarray(merged.T), lora, there, dtype)
    return np.ascontiguousarray(W.T)


def _by_columns(lora: LoRA, kind: str) -> bool:
    """Whether magnitudes are of the columns of what is stored: it is then merged transposed."""
    return kind == "embedding" and lora.magnitude is not None


def _turned(residue: Residue, rows: int, columns: int) -> Residue:
    """Positions in [columns, rows] as those in [rows, columns]."""
    position = residue.position % max(rows, 1) * columns + residue.position // max(rows, 1)
    order = np.argsort(position)
    return Residue(position[order], residue.bits[order], residue.norm)


def oriented(lora: LoRA, kind: str) -> LoRA:
    """The adapter whose B A is the delta of the weight as it is stored; a magnitude is of the rows
    of a linear weight."""
    if kind == "linear":
        A, B = np.ascontiguousarray(lora.A), np.ascontiguousarray(lora.B)
        return LoRA(A, B, lora.scale, magnitude=lora.magnitude, norm=lora.norm)
    return LoRA(np.ascontiguousarray(lora.B.T), np.ascontiguousarray(lora.A.T), lora.scale)


def max_delta(lora: LoRA, kind: str = "linear") -> float:
    """The largest |scale * B A|, in float32."""
    o = oriented(lora, kind)
    parts = (o.B[i : i + _ROWS] @ o.A for i in range(0, o.B.shape[0], _ROWS))
    return abs(float(o.scale)) * max((float(abs(p).max()) for p in parts if p.size), default=0.0)


def digest(array: Array) -> str:
    """The SHA-256, in hex, of the array's bytes in row-major order, little-endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.data.cast("B") if little.size else b"").hexdigest()
