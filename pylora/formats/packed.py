"""Packed models: a directory with config.json, the tokenizer, and weights that are used in place.

`weights.pylora` (formats/panels.py) has the matrices in the order in which the C core's kernels
read them, so that opening one packs and copies nothing: pages come from the file as they are first
used, all processes share them, and a model may be larger than memory. Such a model runs, trains
and is served with the bits of the one that it was made of; its precision is the one that it was
packed in. Other precisions and backends get the numbers that the panels stand for, where those are
numbers in a precision of their own (fp32, bf16). `pylora.formats.pack` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pylora import backends
from pylora.errors import FileFormatError, UnsupportedError
from pylora.files.bounded import read_json
from pylora.formats.base import Array, Checkpoint, Shape, check_tensors, narrow, read_config
from pylora.formats.huggingface import INDEX, MAX_CONFIG, WHOLE
from pylora.formats.panels import FILE, NUMBERS, Panels
from pylora.numbers.precision import PRECISIONS, weights_of

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer


class PackedCheckpoint(Checkpoint):
    """A packed model as a Checkpoint. Raises FileFormatError or UnsupportedError on opening.

    `packed_as`: the precision that it was packed in.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if others := [name for name in (WHOLE, INDEX) if (path / name).exists()]:
            raise FileFormatError(
                f"{path}: there are {FILE} and {others[0]}; take away the one that does not belong "
                "there"
            )
        file = path / "config.json"
        self._settings = read_json(file, limit=MAX_CONFIG)
        self.config = read_config(file, self._settings)
        self._file = Panels(path / FILE)
        self.packed_as = self._file.precision
        if self.packed_as not in PRECISIONS or weights_of(self.packed_as) != self.packed_as:
            raise FileFormatError(
                f"{self._file.path}: there is no precision {self.packed_as[:50]!r}"
            )
        shapes = {name: t.shape for name, t in self._file.tensors.items()}
        self._names = check_tensors(path, self.config, shapes)
        ops: Any = backends.get("c")
        for name, t in self._file.tensors.items():
            if t.kind == NUMBERS:
                continue
            if len(t.shape) != 2 or t.nbytes != ops.panel_bytes(t.kind, *t.shape):
                raise FileFormatError(
                    f"{self._file.path}: tensor {name!r} {list(t.shape)} of kind {t.kind[:50]!r} "
                    f"cannot have {t.nbytes} bytes"
                )

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def names(self) -> tuple[str, ...]:
        return self._names

    def panels(self, name: str) -> tuple[str, Array] | None:
        """A matrix's kind and its bytes, a view of the mapped file; None of a tensor of numbers."""
        kind = self._of(name).kind
        return None if kind == NUMBERS else (kind, self._file.bytes_of(name))

    def _of(self, name: str) -> Any:
        try:
            return self._file.tensors[name]
        except KeyError:
            raise FileFormatError(f"{self.path}: there is no tensor {name!r}") from None

    def shape(self, name: str) -> Shape:
        shape: Shape = self._of(name).shape
        return shape

    def dtype(self, name: str) -> str:
        kind = str(self._of(name).kind)
        return "f32" if kind == NUMBERS else kind

    def load(self, name: str) -> Array:
        found = self.panels(name)
        if found is None:
            return self._file.numbers(name)
        ops: Any = backends.get("c")
        values: Array = ops.unpack(ops.adopt(*found, self.shape(name), self.packed_as))
        return values

    def raw(self, name: str) -> tuple[Array, str]:
        dtype = self.dtype(name)
        if dtype not in ("f32", "bf16"):
            raise UnsupportedError(
                f"{self.path}: tensor {name!r} is packed as {dtype}; it can only be loaded as f32"
            )
        return narrow(self.load(name), dtype), dtype

    def tokenizer(self) -> Tokenizer:
        from pylora.text.tokenizer import tokenizer_from_directory

        return tokenizer_from_directory(self.path)

    def verify(self) -> int:
        """Reads all weights; the bytes that are those that were written. FileFormatError names the
        first tensor of which they are not."""
        tensors = self._file.tensors
        return sum(tensors[name].nbytes for name in self._file.verify())

    def close(self) -> None:
        self._file.close()


def as_numbers(array: Array) -> Array:
    """What a file of panels keeps of a tensor that is not packed."""
    return np.ascontiguousarray(array, np.float32)
