"""Weights in 8 and 4 bits: ggml's Q8_0, Q4_0 and Q4_1 in NumPy: readable, and the core's oracle;
and the values of all kinds of blocks that a weight may be stored in (blocks.py).

A row is cut into groups of 32 numbers. A group is stored as one block: a float16 scale d (Q4_1: and
a float16 minimum m), then 32 codes q; little-endian.

    q8_0    34 bytes    d, 32 codes of 8 bits, -127 .. 127              value d q
    q4_0    18 bytes    d, 32 codes of 4 bits, 0 .. 15                  value d (q - 8)
    q4_1    20 bytes    d, m, 32 codes of 4 bits                        value d q + m

In 4 bits, byte i holds code i in its low half and code i + 16 in its high half. Quantization is
ggml's reference rule, step by step in float32, so the bytes are those of `llama-quantize --pure`.
A group that is not finite has no scale that could tell its numbers: it becomes NaN as a whole.
"""

from __future__ import annotations

import numpy as np

from pylora.errors import DtypeError, ShapeError
from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.ggml_decode import DECODERS
from pylora.numbers.precision import BF16, Stored, from_bf16, to_bf16
from pylora.types import Array

GROUP = 32
KINDS = ("q8_0", "q4_0", "q4_1")


def quantize(W: Array, kind: str) -> Stored:
    """float32 W [d, k] as `kind`: "q8_0", "q4_0", "q4_1" or "bf16".

    Raises ShapeError where k is not a multiple of 32, DtypeError for another kind or dtype.
    """
    if W.ndim != 2 or W.dtype != np.float32:
        raise DtypeError(
            f"a weight to quantize must be float32 [d, k], got {W.dtype} {list(W.shape)}"
        )
    if kind not in (*KINDS, "bf16"):
        raise DtypeError(
            f"numbers are not made into {kind!r} here; choose one of {', '.join(KINDS)}"
        )
    d, k = W.shape
    width = row_bytes(kind, k)
    if kind == "bf16":
        bits = np.ascontiguousarray(to_bf16(W)).view(np.uint8)
        return Stored(kind, bits.reshape(d, width), (d, k))
    x = np.ascontiguousarray(W).reshape(-1, GROUP)
    with np.errstate(all="ignore"):
        blocks = _blocks(x, kind)
    return Stored(kind, blocks.reshape(d, width), (d, k))


def _blocks(x: Array, kind: str) -> Array:
    """x float32 [n, 32] -> uint8 [n, bytes of a block]"""
    one = np.float32(1)
    low = x.min(axis=1, keepdims=True)  # NaN where any is
    if kind == "q8_0":
        scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    elif kind == "q4_0":
        largest = np.abs(x).argmax(axis=1)[:, None]  # the first of them, with its sign: to code 0
        scale = np.take_along_axis(x, largest, axis=1) / np.float32(-8)
    else:
        scale = (x.max(axis=1, keepdims=True) - low) / np.float32(15)
    scale = np.where(np.isnan(low), np.float32(np.nan), scale)
    by = np.where(scale == 0, np.float32(0), one / scale)
    if kind == "q8_0":  # halves away from zero
        v = x * by
        whole = np.trunc(v)
        code = whole + np.where(np.abs(v - whole) >= 0.5, np.copysign(one, v), np.float32(0))
        q = _clip(code, -127, 127).astype(np.int8).view(np.uint8)
    else:
        v = x * by + np.float32(8.5) if kind == "q4_0" else (x - low) * by + np.float32(0.5)
        nibble = _clip(v, 0, 15).astype(np.uint8)
        q = nibble[:, :16] | nibble[:, 16:] << 4
    head = [scale] if kind != "q4_1" else [scale, low]
    return np.hstack([*(np.ascontiguousarray(h, "<f2").view(np.uint8) for h in head), q])


def _clip(code: Array, low: float, high: float) -> Array:
    """Codes in their range; 0 for NaN."""
    return np.where(np.isnan(code), np.float32(0), np.clip(code, low, high))


def dequantize(stored: Stored) -> np.ndarray:
    """The values, float32 [d, k]: those of gguf.quants.dequantize, bit for bit.

    Infinite and NaN scales, which a file may have, give infinite and NaN values. Raises ShapeError
    where the rows have another length than the shape says.
    """
    (d, k), kind = stored.shape, stored.kind
    width = row_bytes(kind, k)
    if stored.rows.shape != (d, width) or stored.rows.dtype != np.uint8:
        raise ShapeError(
            f"a {kind} weight [{d}, {k}] is stored in uint8 [{d}, {width}], "
            f"got {stored.rows.dtype} {list(stored.rows.shape)}"
        )
    rows = np.ascontiguousarray(stored.rows)
    if kind == "bf16":
        return from_bf16(rows.view(BF16)).reshape(d, k)
    with np.errstate(all="ignore"):
        values = DECODERS[kind.upper()](rows.reshape(-1, BLOCKS[kind][1]))
    return np.asarray(values, np.float32).reshape(d, k)
