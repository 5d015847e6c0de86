"""safetensors files: read as checked views of a memory map, written through the library.

Layout: u64 little-endian header length n, n bytes of JSON {name: {dtype, shape, data_offsets}},
then the data; https://github.com/huggingface/safetensors#format. The reader is our own because
NumPy has no bfloat16 (it comes as uint16 bits here) and because the errors must name the tensor.
Everything in the header is checked before any tensor is touched; values, such as NaN, are not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import DtypeError, FileFormatError, UnsupportedError
from pylora.files.kinds import hint
from pylora.files.whole import atomic_write
from pylora.formats.base import Array, Shape, widen
from pylora.types import brief

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMS = 16

_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8",
    "I32": "<i4", "U32": "<u4", "I16": "<i2", "U16": "<u2", "I8": "i1", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
_OTHER = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
ITEMSIZE = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()} | _OTHER


@dataclass(frozen=True)
class Bf16:
    """An array of bfloat16 bits, to be written as such: uint16, any shape."""

    __repr__ = brief

    bits: Array


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its safetensors dtype, shape, and byte range in the data section."""

    dtype: str
    shape: Shape
    start: int
    end: int


class SafeTensors:
    """A safetensors file, open for reading. Raises FileFormatError unless wholly well-formed.

    Attributes: path; tensors: {name: TensorInfo} in file order; metadata: {str: str}.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._data = map_file(self.path)
        size = self._data.size
        if size < 8:
            raise FileFormatError(
                f"{self.path}: {size} bytes are too few for a safetensors file; is it truncated?"
                + hint(self.path)
            )
        length = int.from_bytes(self._data[:8].tobytes(), "little")
        if length > min(MAX_HEADER, size - 8):
            raise FileFormatError(
                f"{self.path}: the header claims {length} bytes, but the file has {size} "
                f"(and {MAX_HEADER} is the most allowed); it is truncated or no safetensors file"
                + hint(self.path, "a safetensors")
            )
        self._start = 8 + length
        self.tensors, self.metadata = _parse(
            self.path, self._data[8 : self._start].tobytes(), size - self._start
        )

    def __repr__(self) -> str:
        return f"SafeTensors({str(self.path)!r}, {len(self.tensors)} tensors)"

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise FileFormatError(f"{self.path}: there is no tensor {name!r}") from None

    def shape(self, name: str) -> Shape:
        """The shape of a tensor."""
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """The dtype as safetensors spells it, in lower case: "f32", "bf16", "i64", ..."""
        return self._info(name).dtype.lower()

    def view(self, name: str) -> Array:
        """The stored tensor, a read-only view of the mapped file; BF16 as uint16, BOOL as uint8."""
        info = self._info(name)
        if info.dtype not in _NUMPY:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is {info.dtype}, which NumPy cannot represent"
            )
        stored = self._data[self._start + info.start : self._start + info.end]
        return stored.view(_NUMPY[info.dtype]).reshape(info.shape)

    def bytes_of(self, name: str) -> Array:
        """The stored bytes of a tensor of any dtype: uint8 [n], a view of the mapped file."""
        info = self._info(name)
        return self._data[self._start + info.start : self._start + info.end]

    def load(self, name: str) -> Array:
        """An F32, F16 or BF16 tensor as float32: a read-only view if it is F32, else a copy."""
        dtype = self.dtype(name)
        if dtype not in ("f32", "f16", "bf16"):
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is {dtype.upper()}; only F32, F16 and BF16 are read"
            )
        return widen(self.view(name), dtype)

    def close(self) -> None:
        """Lets go of the file; views that were handed out stay valid."""
        self._data = np.empty(0, np.uint8)
        self.tensors = {}

    def __enter__(self) -> SafeTensors:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def map_file(path: Path) -> Array:
    """The bytes of a file, uint8, memory-mapped read-only. Raises FileFormatError."""
    if not path.is_file():
        where = "a folder, not a file" if path.is_dir() else "there is no such file"
        raise FileFormatError(f"{path}: {where}")
    if path.stat().st_size == 0:
        raise FileFormatError(f"{path}: the file is empty")
    try:
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path}: cannot be opened ({error})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise FileFormatError(f"the header names {key[:200]!r} twice")
            seen.add(key)
    return result


def _parse(path: Path, header: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Header JSON to tensors and metadata; `size` is the number of data bytes behind it."""
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: the safetensors header is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise FileFormatError(f"{path}: the safetensors header is not a JSON object")
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # mlx writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileFormatError(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _tensor(path, name, entry) for name, entry in table.items()}
    end, before = 0, "the start of the data"
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            what = "overlaps" if info.start < end else "leaves a hole behind"
            raise FileFormatError(
                f"{path}: tensor {name!r} at bytes {info.start}..{info.end} {what} {before}, "
                f"which ends at {end}"
            )
        end, before = info.end, f"tensor {name!r}"
    if end != size:
        raise FileFormatError(
            f"{path}: the tensors need {end} bytes of data, but the file has {size}; "
            f"{'it is truncated' if end > size else 'bytes are left over'} after {before}"
        )
    return tensors, metadata


def _tensor(path: Path, name: str, entry: Any) -> TensorInfo:
    def bad(why: str) -> FileFormatError:
        return FileFormatError(f"{path}: tensor {name[:200]!r}: {why}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("its header entry must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise bad(f"unknown dtype {str(dtype)[:40]!r}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(
            type(n) is int and 0 <= n < 1 << 63 for n in numbers
        ):
            raise bad(f"{what} must be a list of non-negative integers")
    if len(shape) > MAX_DIMS or len(offsets) != 2:
        raise bad(f"{len(shape)} dimensions and {len(offsets)} offsets are not plausible")
    need = ITEMSIZE[dtype]
    for n in shape:
        need *= n
    if offsets[1] - offsets[0] != need:
        raise bad(
            f"{dtype} of shape {tuple(shape)} needs {need} bytes, "
            f"but its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array | Bf16],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `tensors` to `path`, whole or not at all. Bf16(bits) is written as BF16.

    Same input, same bytes. Raises DtypeError for a dtype that safetensors does not have.
    """
    import safetensors

    arrays: dict[str, tuple[Array, str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Bf16):
            if tensor.bits.dtype != np.uint16:
                raise DtypeError(f"{name!r}: bfloat16 bits must be uint16, not {tensor.bits.dtype}")
            arrays[name] = np.ascontiguousarray(tensor.bits, "<u2"), "bfloat16"
            continue
        kind = tensor.dtype.newbyteorder("<")
        if kind.str.lstrip("<|") not in {c.lstrip("<") for c in _NUMPY.values()} | {"b1"}:
            raise DtypeError(f"{name!r}: safetensors has no dtype for NumPy's {tensor.dtype}")
        arrays[name] = np.asarray(tensor, kind, order="C"), tensor.dtype.name
    spec = getattr(safetensors, "TensorSpec", None)  # takes pointers; before 0.8 bytes are taken
    entries: dict[str, Any] = {
        name: spec(dtype=dtype, shape=list(a.shape), data_ptr=a.ctypes.data, data_len=a.nbytes)
        if spec
        else {"dtype": dtype, "shape": list(a.shape), "data": a.tobytes()}
        for name, (a, dtype) in arrays.items()
    }
    with atomic_write(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # the library's file could be read by its owner alone
        try:
            safetensors.serialize_file(entries, beside, dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:  # what the system said is in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(beside)) from error
        if metadata and len(metadata) > 1:
            _sort_metadata(beside)
        beside.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sorts __metadata__ in place: the library writes it in an order that changes from run to run,
    and equal adapters shall be equal files. Same text, another order: the length stays."""
    with open(path, "rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))
