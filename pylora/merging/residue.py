"""`pylora_unmerge.safetensors`: what a merge leaves beside the merged weights to undo it exactly.

Tensors, for each merged module:
    <path>.lora_A.weight, <path>.lora_B.weight    the adapter, as PEFT shapes it (float32)
    <path>.lora_magnitude_vector, <path>.norm     with DoRA, and the lengths that it was divided by
    <path>.rows       u32 [rows of W]             how many residue elements each row of W has
    <path>.columns    u16 or u32 [n]              their columns, ascending within a row
    <path>.bits       u16 or u32 [n]              the original bits there
    <path>.whole      all bits of the original weight, in place of these three if that takes less
    <path>.bias       the original bias, where the merge changed it
    <path>.weight     the original weight, where the adapter has another whole
Metadata: one JSON text, `pylora_unmerge`: version, whether the base ties its embeddings, the size
of its vocabulary where that is another (`vocab`), and the SHA-256 of every tensor of the base and
of the merged model. So 6 bytes per residue element of a float32 weight (4 of bf16 and f16) while a
row has at most 65536 columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError
from pylora.formats.safetensors import Bf16, SafeTensors, save
from pylora.types import LoRA, Residue, brief

Array = np.ndarray[Any, Any]

FILE = "pylora_unmerge.safetensors"
_KEY = "pylora_unmerge"
_VERSION = 1
_BITS: dict[str, Any] = {"f32": np.uint32, "f16": np.uint16, "bf16": np.uint16}


@dataclass(frozen=True)
class Digests:
    """SHA-256, in hex, of a tensor's bytes in the base and in the merged model."""

    base: str
    merged: str


@dataclass
class Record:
    """Everything that a merge remembers. `digests` is by tensor, the rest by module."""

    __repr__ = brief

    tied: bool  # the base uses the embedding as its output layer
    vocab: int | None = None  # of the base, where the merged model's is another
    dtypes: dict[str, str] = field(default_factory=dict)  # of the weight, by module path
    kinds: dict[str, str] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    digests: dict[str, Digests] = field(default_factory=dict)
    tensors: dict[str, Array | Bf16] = field(default_factory=dict)

    def add(self, path: str, kind: str, lora: LoRA, dtype: str, W: Array, lost: Residue) -> int:
        """Remembers how W was merged; returns the bytes that this takes in the file."""
        rows, columns = W.shape
        width: Any = np.uint16 if columns <= 1 << 16 else np.uint32
        counts = np.bincount(lost.position // columns, minlength=rows).astype(np.uint32)
        self.dtypes[path], self.kinds[path], self.scales[path] = dtype, kind, float(lora.scale)
        new = {
            f"{path}.lora_A.weight": np.asarray(lora.A, np.float32),
            f"{path}.lora_B.weight": np.asarray(lora.B, np.float32),
        }
        kept = {
            f"{path}.rows": counts,
            f"{path}.columns": (lost.position % columns).astype(width),
            f"{path}.bits": lost.bits.astype(_BITS[dtype]),
        }
        whole = {f"{path}.whole": np.ascontiguousarray(W).view(_BITS[dtype])}
        new |= whole if sum(a.nbytes for a in kept.values()) > W.nbytes else kept
        if lora.magnitude is not None and lost.norm is not None:
            new[f"{path}.lora_magnitude_vector"] = np.asarray(lora.magnitude, np.float32)
            new[f"{path}.norm"] = np.asarray(lost.norm, np.float32)
        self.tensors |= new
        return sum(a.nbytes for a in new.values())

    def original(self, name: str, array: Array, dtype: str) -> None:
        """Remembers a tensor of the base whole."""
        self.tensors[name] = Bf16(array) if dtype == "bf16" else array

    def write(self, directory: Path) -> None:
        """Writes the file."""
        record = {
            "version": _VERSION,
            "tied": self.tied,
            **({} if self.vocab is None else {"vocab": self.vocab}),
            "dtypes": self.dtypes,
            "kinds": self.kinds,
            "scales": self.scales,
            "digests": {name: asdict(d) for name, d in self.digests.items()},
        }
        save(directory / FILE, self.tensors, {"format": "pt", _KEY: json.dumps(record)})


class Reader:
    """A residue file, checked as it is read: FileFormatError names the module that is damaged."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE
        if not self.path.is_file():
            raise FileFormatError(
                f"{directory}: there is no {FILE}, so this model cannot be unmerged; it is written "
                "by `pylora merge` beside the merged weights"
            )
        self._file = SafeTensors(self.path)
        values = self._parse(self._file.metadata.get(_KEY, ""))
        # What is in the metadata was checked by _parse.
        digests = {name: Digests(**d) for name, d in values.pop("digests").items()}
        del values["version"]
        self.record = Record(**values, digests=digests)

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{self.path}: the metadata are not JSON ({error})") from None
        names = {"version", "tied", "dtypes", "kinds", "scales", "digests"}
        if not isinstance(values, dict) or values.keys() - {"vocab"} != names:
            raise FileFormatError(f"{self.path}: the metadata must have {', '.join(sorted(names))}")
        if values["version"] != _VERSION:
            raise FileFormatError(
                f"{self.path}: version {values['version']!r}; this pylora reads {_VERSION}"
            )
        tables = [values[name] for name in ("dtypes", "kinds", "scales", "digests")]
        vocab = values.setdefault("vocab", None)
        if type(vocab) not in (int, type(None)) or not 0 < (vocab or 1) < 2**31:
            raise FileFormatError(f"{self.path}: the metadata have the vocabulary {vocab!r:.60}")
        if not isinstance(values["tied"], bool) or not all(isinstance(t, dict) for t in tables):
            raise FileFormatError(f"{self.path}: the metadata have values of the wrong type")
        dtypes, kinds, scales, digests = tables
        for path in dtypes:
            ok = dtypes[path] in _BITS and kinds.get(path) in ("linear", "embedding")
            scale = scales.get(path)
            if not ok or not isinstance(scale, (int, float)) or not math.isfinite(scale):
                raise FileFormatError(f"{self.path}: the metadata of {path[:200]!r} are invalid")
        for name, d in digests.items():
            if not isinstance(d, dict) or d.keys() != {"base", "merged"} or not _all_hex(d):
                raise FileFormatError(f"{self.path}: the digests of {name[:200]!r} are invalid")
        return values

    def _tensor(self, name: str, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> Array:
        found, dtype = self._file.shape(name), self._file.dtype(name)
        if (shape is not None and found != shape) or len(found) > 2 or dtype not in dtypes:
            raise FileFormatError(
                f"{self.path}: tensor {name!r} is {dtype.upper()} of shape {found}, expected "
                f"{' or '.join(d.upper() for d in dtypes)} of shape {shape}"
            )
        return self._file.view(name)

    def lora(self, path: str, d: int, k: int) -> LoRA:
        """The adapter of a module of d outputs and k inputs."""
        r = self._file.shape(f"{path}.lora_A.weight")[:1]
        A = self._tensor(f"{path}.lora_A.weight", (*r, k), ("f32",))
        B = self._tensor(f"{path}.lora_B.weight", (d, *r), ("f32",))
        return LoRA(A, B, float(self.record.scales[path]), magnitude=self._magnitude(path, d))

    def _magnitude(self, path: str, d: int) -> Array | None:
        name = f"{path}.lora_magnitude_vector"
        return self._tensor(name, (d,), ("f32",)) if name in self._file.tensors else None

    def residue(self, path: str, shape: tuple[int, int]) -> Residue:
        """What the merge of a weight of `shape` rounded away."""
        rows, columns = shape
        norm = None
        if f"{path}.lora_magnitude_vector" in self._file.tensors:
            d = self._file.shape(f"{path}.lora_magnitude_vector")
            norm = self._tensor(f"{path}.norm", d, ("f32",))
        kind = "u32" if self.record.dtypes[path] == "f32" else "u16"
        if f"{path}.whole" in self._file.tensors:
            whole = self._tensor(f"{path}.whole", shape, (kind,)).astype(np.uint32)
            return Residue(np.arange(rows * columns, dtype=np.int64), whole.reshape(-1), norm)
        counts = self._tensor(f"{path}.rows", (rows,), ("u32",)).astype(np.int64)
        n = int(counts.sum())
        column = self._tensor(f"{path}.columns", (n,), ("u16", "u32")).astype(np.int64)
        bits = self._tensor(f"{path}.bits", (n,), (kind,)).astype(np.uint32)
        position = np.repeat(np.arange(rows, dtype=np.int64) * columns, counts) + column
        if n and (int(column.max()) >= columns or bool((np.diff(position) <= 0).any())):
            raise FileFormatError(f"{self.path}: the residue positions of {path} are not in order")
        return Residue(position, bits, norm)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def original(self, name: str, shape: tuple[int, ...], dtype: str) -> Array | None:
        """A tensor of the base that is kept whole: a bias that the merge changed, or what an
        adapter brought a weight in place of."""
        return self._tensor(name, shape, (dtype,)) if name in self._file.tensors else None


def _all_hex(digests: Mapping[str, Any]) -> bool:
    return all(isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) for v in digests.values())
