"""Weights as ggml's block types, for files, with the bytes of ggml's own quantizer."""

from __future__ import annotations

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.marshal import check
from pylora.errors import DtypeError, ShapeError
from pylora.types import Array

TYPES = {
    "Q4_0": lib.PYLORA_BLOCK_Q4_0,
    "Q4_1": lib.PYLORA_BLOCK_Q4_1,
    "Q5_0": lib.PYLORA_BLOCK_Q5_0,
    "Q5_1": lib.PYLORA_BLOCK_Q5_1,
    "Q8_0": lib.PYLORA_BLOCK_Q8_0,
    "Q2_K": lib.PYLORA_BLOCK_Q2_K,
    "Q3_K": lib.PYLORA_BLOCK_Q3_K,
    "Q4_K": lib.PYLORA_BLOCK_Q4_K,
    "Q5_K": lib.PYLORA_BLOCK_Q5_K,
    "Q6_K": lib.PYLORA_BLOCK_Q6_K,
}


def encode_blocks(x: Array, kind: str) -> np.ndarray:
    """float32 x [rows, k], finite, as uint8 [rows, bytes of a row] of ggml's type `kind`, such as
    "Q4_K". Raises DtypeError for another type or dtype, ShapeError where k is no multiple of the
    numbers in a block."""
    if kind not in TYPES:
        raise DtypeError(f"there is no writer of the type {kind}; there are {', '.join(TYPES)}")
    if x.ndim != 2 or x.dtype != np.float32:
        raise DtypeError(f"numbers to encode must be float32 [rows, k], got {x.dtype} {x.shape}")
    rows, k = x.shape
    width = lib.pylora_blocks_bytes(TYPES[kind], k)
    if width < 0:
        raise ShapeError(f"rows of {k} numbers are not made of whole {kind} blocks")
    own, out = np.ascontiguousarray(x), np.empty((rows, width), np.uint8)
    start, to = ffi.cast("float *", own.ctypes.data), ffi.cast("void *", out.ctypes.data)
    check(lib.pylora_encode_blocks(TYPES[kind], rows, k, start, to), "encode_blocks")
    return out
