"""The file of a packed model's weights: written once, then mapped read-only and used in place.

    64 bytes   "PYLORAPK", version u32, layout u32, the table's place and length u64, its SHA-256
    the data   each tensor's bytes, 64-byte aligned, in the order of the table
    the table  JSON: precision, byte_order, made_of, tensors, {name: [kind, shape, start, bytes,
               sha256]}

Integers are little-endian. A tensor of kind "numbers" is float32 in row-major order; of any other
kind it is a matrix in the panels that every kernel table of the C core reads (csrc/formats/), in
the byte order that the table names. The table is checked wholly before anything is looked at; that
the data are those that were written is asked by `verify` alone, since it reads all of them.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.files.kinds import hint
from pylora.formats.base import Array, Shape
from pylora.formats.safetensors import map_file

FILE = "weights.pylora"
VERSION = 1
LAYOUT = 1  # pylora.h's PYLORA_LAYOUT
NUMBERS = "numbers"

_MAGIC, _START = b"PYLORAPK", struct.Struct("<8sIIQQ32s")
_ALIGN = 64
_MAX_TABLE = 256 << 20  # bytes
_PART = 1 << 24  # bytes that are read at a time to be verified
_AGAIN = "write it again with `pylora pack`"


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in the file, and what its bytes were when it was written."""

    kind: str
    shape: Shape
    start: int
    nbytes: int
    sha256: str


class PanelsWriter:
    """Writes tensors one behind the other; `finish` makes a file of them."""

    def __init__(self, file: BinaryIO, precision: str, made_of: str) -> None:
        self._file, self._tensors = file, {}  # type: tuple[BinaryIO, dict[str, Any]]
        self._about = {"precision": precision, "byte_order": sys.byteorder, "made_of": made_of}
        self._at = file.write(bytes(_START.size))

    def add(self, name: str, kind: str, shape: Shape, data: Array) -> None:
        """The bytes of an array, whatever its dtype."""
        content = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        self._at += self._file.write(bytes(-self._at % _ALIGN))
        digest = hashlib.sha256(content.data).hexdigest()
        self._tensors[name] = [kind, list(shape), self._at, content.size, digest]
        self._at += self._file.write(content.data)

    def finish(self) -> int:
        """Writes the table, then what says where it is; returns the bytes of the file."""
        table = json.dumps(self._about | {"tensors": self._tensors}, separators=(",", ":")).encode()
        self._file.write(table)
        digest = hashlib.sha256(table).digest()
        self._file.seek(0)
        self._file.write(_START.pack(_MAGIC, VERSION, LAYOUT, self._at, len(table), digest))
        return self._at + len(table)


class Panels:
    """Such a file, open for reading: `precision`, `made_of`, `tensors`. Raises FileFormatError
    where it is truncated or damaged, UnsupportedError where it was made for another machine or
    version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path)
        text = self._table()
        try:
            about = json.loads(text)
            self.precision, self.made_of = str(about["precision"]), str(about["made_of"])
            order, listed = about["byte_order"], about["tensors"]
            self.tensors = {name: _tensor(*entry) for name, entry in listed.items()}
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{path}: its table cannot be read ({error}); {_AGAIN}") from None
        if order != sys.byteorder:
            raise UnsupportedError(
                f"{path}: packed on a machine of {order}-endian byte order, and this one is "
                f"{sys.byteorder}-endian; {_AGAIN} here"
            )
        self._check_places()

    def __repr__(self) -> str:
        return f"Panels({str(self.path)!r}, {len(self.tensors)} tensors in {self.precision})"

    def _table(self) -> bytes:
        path, size = self.path, self._data.size
        start = self._data[: _START.size].tobytes()
        if size < _START.size or start[: len(_MAGIC)] != _MAGIC:
            what = "too short for" if _MAGIC.startswith(start[: len(_MAGIC)]) else "not"
            raise FileFormatError(f"{path}: {what} the weights of a packed model{hint(path)}")
        _, version, layout, at, length, digest = _START.unpack(start)
        if (version, layout) != (VERSION, LAYOUT):
            raise UnsupportedError(
                f"{path}: version {version} with panels of layout {layout}; this pylora reads "
                f"version {VERSION} with layout {LAYOUT}; {_AGAIN}"
            )
        if length > _MAX_TABLE or not _START.size <= at <= size or at + length != size:
            raise FileFormatError(
                f"{path}: the file has {size} bytes, and its start says {at + length}: it is "
                f"truncated or damaged; {_AGAIN}"
            )
        text = self._data[at:].tobytes()
        if hashlib.sha256(text).digest() != digest:
            raise FileFormatError(f"{path}: its table was changed or is damaged; {_AGAIN}")
        self._end = int(at)
        return text

    def _check_places(self) -> None:
        end = _START.size
        for name, t in self.tensors.items():
            if t.start < end or t.start % _ALIGN:
                raise FileFormatError(
                    f"{self.path}: tensor {name[:200]!r} overlaps another or is not aligned"
                )
            end = t.start + t.nbytes
            if end > self._end:
                raise FileFormatError(
                    f"{self.path}: tensor {name[:200]!r} ends at byte {end}, and the data at "
                    f"{self._end}"
                )

    def bytes_of(self, name: str) -> Array:
        """The bytes of a tensor: a read-only view of the mapped file."""
        t = self.tensors[name]
        return self._data[t.start : t.start + t.nbytes]

    def numbers(self, name: str) -> Array:
        """A tensor of kind "numbers", as float32: a read-only view. FileFormatError where its size
        is not that of its shape, or its bytes are not those that were written."""
        t = self.tensors[name]
        content = self.bytes_of(name)
        if t.nbytes != 4 * int(np.prod(t.shape, dtype=object)):
            raise FileFormatError(
                f"{self.path}: tensor {name[:200]!r} {list(t.shape)} has {t.nbytes} bytes"
            )
        if hashlib.sha256(content.data).hexdigest() != t.sha256:
            raise FileFormatError(self._changed(name))
        return content.view(np.float32).reshape(t.shape)

    def verify(self) -> Iterator[str]:
        """Reads all data; the name of each tensor whose bytes are those that were written.
        FileFormatError at the first of which they are not."""
        for name, t in self.tensors.items():
            digest, content = hashlib.sha256(), self.bytes_of(name)
            for i in range(0, t.nbytes, _PART):
                digest.update(content[i : i + _PART].data)
            if digest.hexdigest() != t.sha256:
                raise FileFormatError(self._changed(name))
            yield name

    def _changed(self, name: str) -> str:
        return (
            f"{self.path}: tensor {name[:200]!r} is not what was written: the file was changed or "
            f"is damaged; {_AGAIN}"
        )

    def close(self) -> None:
        """Lets go of the file; views that were handed out keep it mapped."""
        self._data = np.empty(0, np.uint8)


def _tensor(kind: Any, shape: Any, start: Any, nbytes: Any, sha256: Any) -> Tensor:
    return Tensor(str(kind), tuple(map(_whole, shape)), _whole(start), _whole(nbytes), str(sha256))


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a whole number from 0 on")
    return value
