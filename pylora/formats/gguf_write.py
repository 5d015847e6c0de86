"""Writes GGUF files (version 3, little-endian), tensor by tensor, so that memory does not grow with
the model. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

It knows no names and no models. Nothing here is atomic: write into `atomic_write`'s path.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pylora.formats.base import Array, Shape
from pylora.formats.ggml import BLOCK_TYPES, BY_NAME

ALIGNMENT = 32
_NUMBER_OF = {block.name: number for number, block in BLOCK_TYPES.items()}
_U32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 6, 7, 8, 9, 10, 11
_ARRAYS = {
    "u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11,
    "f8": 12,
}  # fmt: skip


class Raw(bytes):
    """A value as another file holds it: its type and its bytes."""


def tensor_bytes(kind: str, shape: Shape) -> int:
    """Bytes of a tensor of ggml's type `kind`, such as "Q4_K", whose last axis is whole blocks."""
    block = BY_NAME[kind]
    if shape[-1] % block.numbers:
        raise ValueError(f"{shape} is not made of whole {kind} blocks of {block.numbers}")
    return math.prod(shape[:-1]) * (shape[-1] // block.numbers) * block.size


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    specs: Mapping[str, tuple[str, Shape]],
    produce: Callable[[str], Array],
) -> int:
    """Writes `path`; returns the bytes of all tensors.

    metadata: bool, int (32 bits unsigned where it fits), float (32 bits), str, lists of str, arrays
    of numbers, and Raw. specs: name -> ggml's type and shape, slowest axis first. `produce(name)`
    gives a tensor's stored bytes, an array of any dtype and shape whose bytes in memory they are.
    """
    head = [b"GGUF", struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        head += [_text(key), encoded(value)]
    offset, sizes = 0, {}
    for name, (kind, shape) in specs.items():
        sizes[name] = size = tensor_bytes(kind, shape)
        head.append(_text(name) + struct.pack("<I", len(shape)))
        head.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        head.append(struct.pack("<IQ", _NUMBER_OF[kind], offset))
        offset += size + -size % ALIGNMENT
    start = b"".join(head)
    with open(path, "wb") as out:
        out.write(start + bytes(-len(start) % ALIGNMENT))
        for name, size in sizes.items():
            array = np.ascontiguousarray(produce(name))
            if array.nbytes != size:
                raise ValueError(f"{name}: {array.nbytes} bytes instead of {size}")
            if array.dtype.byteorder == ">":
                array = array.astype(array.dtype.newbyteorder("<"))
            out.write(array.data)
            out.write(bytes(-size % ALIGNMENT))
    return sum(sizes.values())


def encoded(value: Any) -> bytes:
    """A metadata value's type and bytes. TypeError for one that GGUF has no type for."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        if 0 <= value < 1 << 32:
            return struct.pack("<II", _U32, value)
        return struct.pack("<IQ", _U64, value) if value > 0 else struct.pack("<Iq", _I64, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        items = b"".join(map(_text, value))
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + items
    if isinstance(value, np.ndarray) and value.dtype.str[1:] in _ARRAYS and value.ndim == 1:
        kind = _ARRAYS[value.dtype.str[1:]]
        little = value.astype(value.dtype.newbyteorder("<"))
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + little.tobytes()
    raise TypeError(f"GGUF has no type for {type(value).__name__}")


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
