"""Writes GGUF files (version 3, little-endian) with unquantized tensors, byte for byte the same
for the same input. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

It knows no names and no models, and quantizes nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.files.whole import atomic_write

_ALIGNMENT = 32
_U32, _F32, _BOOL, _STRING, _ARRAY, _I32 = 4, 6, 7, 8, 9, 5
_KINDS = {np.dtype("<f4"): 0, np.dtype("<f2"): 1}  # NumPy's dtype -> ggml's number


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Writes `path`. metadata: str, bool, int (u32), float (f32), or a list of str, int or float;
    tensors: float32 and float16 arrays, in the order in which they are stored.

    TypeError for a value or an array of another type.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), _value(value)]
    at, data = 0, []
    for name, tensor in tensors.items():
        array = np.ascontiguousarray(tensor)
        if array.dtype not in _KINDS:
            raise TypeError(f"{name}: {array.dtype} is not float32 or float16")
        shape = array.shape[::-1]  # the fastest axis first
        head.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        head.append(struct.pack("<IQ", _KINDS[array.dtype], at))
        data.append(_padded(array.tobytes()))
        at += len(data[-1])
    with atomic_write(path) as beside:
        beside.write_bytes(b"".join([_padded(b"".join(head)), *data]))


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _text(value)
    raise TypeError(f"metadata of type {type(value).__name__} cannot be written")


def _value(value: Any) -> bytes:
    if not isinstance(value, (list, tuple)):
        kind, data = _scalar(value)
        return struct.pack("<I", kind) + data
    items = [_scalar(item) for item in value]
    kind = items[0][0] if items else _STRING
    # llama.cpp reads the kinds of tokens as signed numbers.
    written = _I32 if kind == _U32 else kind
    return struct.pack("<IIQ", _ARRAY, written, len(items)) + b"".join(d for _, d in items)
