"""Merging one weight, undoing it, and the digest that proves it: thin over a backend's operations.

An embedding is stored [vocab, hidden], so its delta is scale * Aᵀ Bᵀ; of every other module it is
scale * B A. Biases are not looked at here.
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
    merged, residue = ops.merge(W, oriented(lora, kind), dtype)
    return merged, residue


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
    W: Array = ops.unmerge(merged, oriented(lora, kind), residue, dtype)
    return W


def oriented(lora: LoRA, kind: str) -> LoRA:
    """The adapter whose B A is the delta of the weight as it is stored."""
    A, B = (lora.A, lora.B) if kind == "linear" else (lora.B.T, lora.A.T)
    return LoRA(np.ascontiguousarray(A), np.ascontiguousarray(B), lora.scale)


def max_delta(lora: LoRA, kind: str = "linear") -> float:
    """The largest |scale * B A|, in float32."""
    o = oriented(lora, kind)
    parts = (o.B[i : i + _ROWS] @ o.A for i in range(0, o.B.shape[0], _ROWS))
    return abs(float(o.scale)) * max((float(abs(p).max()) for p in parts if p.size), default=0.0)


def digest(array: Array) -> str:
    """The SHA-256, in hex, of the array's bytes in row-major order, little-endian."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(little.data.cast("B") if little.size else b"").hexdigest()
