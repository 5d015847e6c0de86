"""Weights as GGUF files store them: plain, or in ggml's block types with the bytes that llama.cpp's
own quantizer makes (without an importance matrix). Which type a tensor gets is in gguf_types.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from pylora.errors import BackendError, ConfigError, UnsupportedError
from pylora.formats.base import Array, narrow, widen
from pylora.formats.gguf import dequantize

FLOATS = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def encode(x: Array, kind: str, where: str) -> Array:
    """float32 x [.., k] as ggml's type `kind` stores it: an array whose bytes are the tensor's.

    Raises UnsupportedError for a type that is read and not written, and ConfigError, naming
    `where`, for numbers that are not finite, or become infinite in float16.
    """
    if not np.isfinite(x).all():
        raise ConfigError(
            f"{where} has {int((~np.isfinite(x)).sum())} numbers that are NaN or infinite, which "
            "no quantized type can hold"
        )
    if kind in FLOATS:
        stored = narrow(x, kind.lower())
        if kind == "F16" and not np.isfinite(stored).all():
            raise ConfigError(
                f"{where}: {int((~np.isfinite(stored)).sum())} values are too large for f16; take "
                "--type bf16 or f32"
            )
        return stored
    if kind not in BLOCKS:
        raise UnsupportedError(
            f"{where} is to be {kind}, which pylora reads and does not write; choose another --type"
        )
    rows: Array = _core().encode_blocks(x.reshape(-1, x.shape[-1]), kind)
    return rows


def decode(stored: Array, kind: str, where: str) -> Array:
    """The numbers of what `encode` gave: float32 [rows, k], or the shape that it has."""
    if kind in FLOATS:
        return widen(stored, kind.lower())
    return dequantize(stored, kind.lower(), where)


def _core() -> Any:
    try:
        return importlib.import_module("pylora.backends.c.encoding")
    except ImportError as error:
        raise BackendError(
            f"quantized files are written by the C core, which is not built here ({error}); "
            "reinstall pylora with a C compiler present, or choose --type f32, f16 or bf16"
        ) from error
