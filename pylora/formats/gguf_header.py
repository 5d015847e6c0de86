"""The header of a GGUF file, walked with every count and length checked against the file's size.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3, little-endian.
Only metadata and the places of tensors are read here; what they mean is formats/gguf.py's matter.
Nothing is allocated that is not already in the file, and no loop is longer than the file.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.files.kinds import hint
from pylora.formats.base import Array, Shape
from pylora.formats.ggml import BLOCK_TYPES
from pylora.formats.safetensors import map_file
from pylora.types import brief

MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's place: ggml type, shape (slowest axis first, as in NumPy), absolute byte range."""

    kind: str  # "F32", "Q4_1", ...
    shape: Shape
    start: int
    end: int
    part: int = 0  # which file of a split model


@dataclass(frozen=True)
class GGUFHeader:
    """A checked header. metadata: {key: bool | int | float | str | list[str] | ndarray}."""

    __repr__ = brief

    path: Path
    data: Array  # the whole file, uint8, mapped
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    more: tuple[Array, ...] = ()  # the further files of a split model
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of metadata: type, value

    def value(self, key: str) -> bytes:
        """A metadata value as it is stored: its type, then its bytes."""
        begin, end = self.places[key]
        return self.data[begin:end].tobytes()

    def rows(self, name: str) -> Array:
        """The stored bytes of a tensor, uint8 [rows, bytes per row], a read-only view."""
        tensor = self.tensors[name]
        rows = 1
        for n in tensor.shape[:-1]:
            rows *= n
        data = self.more[tensor.part - 1] if tensor.part else self.data
        return data[tensor.start : tensor.end].reshape(rows, -1)


def read_header(path: Path) -> GGUFHeader:
    """Reads and checks the header. Raises FileFormatError, and UnsupportedError for versions or
    tensor types that are known to exist but not read here."""
    data = map_file(path)
    walk = _Walk(path, data)
    if bytes(walk.take(4, "the magic number")) != b"GGUF":
        raise FileFormatError(
            f"{path}: this is not a GGUF file (its first bytes are not 'GGUF'){hint(path)}"
        )
    version = walk.u32("the version")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        raise UnsupportedError(
            f"{path}: GGUF {'of big-endian byte order' if swapped else f'version {version}'} "
            "is not supported; convert it with llama.cpp's tools to version 3, little-endian"
        )
    tensor_count = walk.count("the number of tensors", least=8 + 4 + 8 + 4 + 8)
    pair_count = walk.count("the number of metadata entries", least=8 + 4 + 1)
    metadata: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(pair_count):
        key = walk.string("a metadata key")
        if key in metadata:
            raise FileFormatError(f"{path}: the metadata key {key[:200]!r} occurs twice")
        begin = walk.at
        metadata[key] = walk.value(f"metadata {key[:200]!r}")
        places[key] = begin, walk.at
    tensors = _tensors(walk, tensor_count, _alignment(path, metadata))
    return GGUFHeader(path, data, metadata, tensors, places=places)


class _Walk:
    """A cursor that never leaves the file."""

    def __init__(self, path: Path, data: Array) -> None:
        self.path, self.data, self.at, self.size = path, data, 0, int(data.size)
        self._bytes = memoryview(data)  # type: ignore[arg-type]

    def take(self, n: int, what: str) -> memoryview:
        if n > self.size - self.at:
            raise FileFormatError(
                f"{self.path}: {what} at byte {self.at} needs {n} bytes, but the file ends after "
                f"{self.size - self.at}; it is truncated or damaged"
            )
        self.at += n
        return self._bytes[self.at - n : self.at]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def count(self, what: str, least: int) -> int:
        """A u64 count of things that take at least `least` bytes each of what is left."""
        n = self.u64(what)
        if n * least > self.size - self.at:
            raise FileFormatError(
                f"{self.path}: {what} is {n}, more than fit into the {self.size - self.at} bytes "
                "that follow; the file is truncated or damaged"
            )
        return n

    def string(self, what: str) -> str:
        text = self.take(self.count(f"the length of {what}", 1), what)
        try:
            return str(text, "utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{self.path}: {what} is not UTF-8 ({error.reason})") from error

    def value(self, what: str) -> Any:
        kind = self.u32(what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        return self.scalars(kind, 1, what)[0].item()

    def scalars(self, kind: int, n: int, what: str) -> Array:
        if kind not in _SCALARS:
            raise FileFormatError(f"{self.path}: {what} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        stored = np.frombuffer(self.take(n * dtype.itemsize, what), np.uint8)
        return stored != 0 if dtype == np.bool_ else stored.view(dtype)

    def array(self, what: str) -> Any:
        kind = self.u32(what)
        if kind == _ARRAY:
            raise FileFormatError(f"{self.path}: {what} is an array of arrays")
        n = self.count(f"the length of {what}", 8 if kind == _STRING else 1)
        if kind != _STRING:
            return self.scalars(kind, n, what)
        item = f"an entry of {what}"
        return [self.string(item) for _ in range(n)]


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    n = metadata.get("general.alignment", 32)
    if type(n) is not int or n < 1 or n & (n - 1) or n > MAX_ALIGNMENT:
        raise FileFormatError(f"{path}: general.alignment is {n!r:.40}, not a power of two")
    return n


def _tensors(walk: _Walk, count: int, alignment: int) -> dict[str, GGUFTensor]:
    found: dict[str, tuple[str, Shape, int, int]] = {}
    for _ in range(count):
        name = walk.string("a tensor name")
        where = f"tensor {name[:200]!r}"
        if name in found:
            raise FileFormatError(f"{walk.path}: {where} occurs twice")
        dims = walk.u32(f"the dimensions of {where}")
        if not 1 <= dims <= MAX_DIMS:
            raise FileFormatError(f"{walk.path}: {where} has {dims} dimensions, not 1 to 4")
        shape = tuple(walk.u64(f"the shape of {where}") for _ in range(dims))[::-1]
        number, offset = walk.u32(f"the type of {where}"), walk.u64(f"the offset of {where}")
        if (kind := BLOCK_TYPES.get(number)) is None:
            raise UnsupportedError(f"{walk.path}: {where} has the unknown ggml type {number}")
        if min(shape) < 1 or shape[-1] % kind.numbers:
            raise FileFormatError(
                f"{walk.path}: {where} has the shape {shape}, which is empty or not made of whole "
                f"{kind.name} blocks of {kind.numbers}"
            )
        nbytes = shape[-1] // kind.numbers * kind.size
        for n in shape[:-1]:
            nbytes *= n
        found[name] = (kind.name, shape, offset, nbytes)
    start = -(-walk.at // alignment) * alignment
    return _place(walk, found, start, alignment)


def _place(
    walk: _Walk, found: dict[str, tuple[str, Shape, int, int]], start: int, alignment: int
) -> dict[str, GGUFTensor]:
    """Checks that the byte ranges are aligned, inside the file and do not overlap."""
    end, before = 0, "nothing"
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda item: item[1][2]):
        where = f"{walk.path}: tensor {name[:200]!r} at offset {offset}"
        if offset % alignment:
            raise FileFormatError(f"{where} is not aligned to {alignment} bytes")
        if offset < end:
            raise FileFormatError(f"{where} overlaps tensor {before[:200]!r}, which ends at {end}")
        if start + offset + nbytes > walk.size:
            raise FileFormatError(
                f"{where} needs {nbytes} bytes, but the file ends after "
                f"{max(walk.size - start - offset, 0)}; it is truncated or damaged"
            )
        end, before = offset + nbytes, name
    return {
        name: GGUFTensor(kind, shape, start + offset, start + offset + nbytes)
        for name, (kind, shape, offset, nbytes) in found.items()
    }
