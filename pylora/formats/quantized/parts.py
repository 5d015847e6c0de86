"""A weight that a Hugging Face file stores as codes and scales, in several tensors.

`Parts` are these tensors, each checked for dtype and shape as it is taken; `Spec` is what a way of
quantizing makes of them; `Quantized` is the weight as a checkpoint asks for it, in the place of the
file. Nothing is decoded before it is asked for, and a few rows at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.formats.base import Array, Shape, narrow, widen
from pylora.formats.safetensors import SafeTensors

CHUNK = 1 << 18  # numbers decoded at a time, so that temporaries stay in the cache
FLOATS = ("f32", "f16", "bf16")
_STORED: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}


@dataclass(frozen=True)
class Spec:
    """A weight as it will be read: float32 values from `rows`, rounded once to `dtype`."""

    shape: Shape  # [out, in], or [experts, a, b]
    dtype: str  # "f32", "f16" or "bf16": what the library that wrote it computes the numbers in
    form: str  # "nf4"
    # (expert, first row, one past the last) -> float32 [rows, in]; prepared by `numbers` once
    prepare: Callable[[], Callable[[int, int, int], Array]]

    def numbers(self, expert: int | None = None) -> Array:
        """The weight in `dtype` (bf16 as uint16 bits), or that of one expert."""
        d, k = self.shape[-2:]
        first = 0 if expert is None else expert
        count = math.prod(self.shape[:-2]) if expert is None else 1
        out = np.empty((count, d, k), _STORED[self.dtype])
        rows = self.prepare()
        step = max(1, CHUNK // max(k, 1))
        with np.errstate(all="ignore"):  # values are not judged
            for e in range(count):
                for i in range(0, d, step):
                    j = min(i + step, d)
                    out[e, i:j] = narrow(rows(first + e, i, j), self.dtype)
        whole: Array = out.reshape(self.shape) if expert is None else out[0]
        return whole


class Parts:
    """The tensors of one weight by what they are called behind its module's name."""

    def __init__(self, module: str, weight: str) -> None:
        """weight: what the model calls the tensor, "model.layers.0.mlp.up_proj.weight"."""
        self.module, self.weight = module, weight
        self.found: dict[str, tuple[SafeTensors, str]] = {}

    def __contains__(self, ending: str) -> bool:
        return ending in self.found

    def add(self, ending: str, file: SafeTensors, name: str) -> None:
        """Takes a tensor of a file; FileFormatError for a second one of that ending."""
        if ending in self.found:
            self.fail(ending, f"is there twice: also as {name[:200]!r}")
        self.found[ending] = file, name

    @property
    def path(self) -> Path:
        """The file of one of them, for errors."""
        return next(iter(self.found.values()))[0].path

    def fail(self, ending: str, why: str) -> NoReturn:
        """FileFormatError about one of the tensors."""
        file, name = self._find(ending)
        raise FileFormatError(f"{file.path}: tensor {name[:200]!r} {why}")

    def _find(self, ending: str) -> tuple[SafeTensors, str]:
        if ending not in self.found:
            raise FileFormatError(
                f"{self.path}: the weight {self.weight[:200]!r} is quantized, but its {ending!r} "
                "is missing"
            )
        return self.found[ending]

    def shape(self, ending: str) -> Shape:
        """The shape of a tensor; FileFormatError where it is missing."""
        file, name = self._find(ending)
        return file.shape(name)

    def dtype(self, ending: str) -> str:
        """The dtype of a tensor, in lower case."""
        file, name = self._find(ending)
        return file.dtype(name)

    def check(self, ending: str, dtypes: Sequence[str], *shapes: Shape) -> str:
        """The dtype, if it is one of `dtypes` and the shape one of `shapes`, where any is given."""
        dtype, shape = self.dtype(ending), self.shape(ending)
        if dtype not in dtypes:
            self.fail(ending, f"is {dtype.upper()}; expected {' or '.join(dtypes).upper()}")
        if shapes and shape not in shapes:
            self.fail(ending, f"has shape {shape}; expected {' or '.join(map(str, shapes))}")
        return dtype

    def array(self, ending: str) -> Array:
        """The tensor as stored: a view, bfloat16 as uint16 bits."""
        file, name = self._find(ending)
        return file.view(name)

    def bytes(self, ending: str) -> Array:
        """The bytes of the tensor: uint8 [n]."""
        file, name = self._find(ending)
        return file.bytes_of(name)

    def floats(self, ending: str) -> Array:
        """A tensor of F32, F16 or BF16 as float32; FileFormatError for NaN and infinity: what
        scales are not finite make everything that they scale worthless."""
        values = widen(self.array(ending), self.check(ending, FLOATS))
        if not np.isfinite(values).all():
            self.fail(ending, "has numbers that are NaN or infinite; the file is damaged")
        return values

    def groups(self, ending: str, inputs: int, count: int) -> Array:
        """The group of each input, int64 [inputs]; FileFormatError for one that is not there."""
        self.check(ending, ("i32", "i64"), (inputs,))
        index = self.array(ending).astype(np.int64)
        if index.size and (index.min() < 0 or index.max() >= count):
            self.fail(
                ending,
                f"names group {int(index.max() if index.max() >= count else index.min())}, "
                f"and there are {count}",
            )
        return index


class Quantized:
    """One quantized weight, with the methods of a file that a checkpoint asks for; `name` is of no
    account. Its tensors are checked when it is first looked at."""

    turned = False  # whether a plain file has this weight [in, out]: then it is given so

    def __init__(self, parts: Parts, read: Callable[[Parts], Spec]) -> None:
        self.parts, self._read = parts, read

    @property
    def path(self) -> Path:
        """The file that holds the first of its tensors."""
        return self.parts.path

    @functools.cached_property
    def spec(self) -> Spec:
        """What its tensors say, checked. Raises FileFormatError or UnsupportedError."""
        return self._read(self.parts)

    def shape(self, name: str) -> Shape:
        """The shape of the weight in the model's file, were it not quantized."""
        return self.spec.shape[::-1] if self.turned else self.spec.shape

    def dtype(self, name: str) -> str:
        """What its numbers are rounded to: "f32", "f16" or "bf16"."""
        return self.spec.dtype

    def form(self, name: str) -> str:
        """How it is stored: "nf4", "fp8", ..."""
        return self.spec.form

    def view(self, name: str) -> Array:
        """The numbers, dequantized."""
        numbers = self.spec.numbers()
        return numbers.T if self.turned else numbers

    def part(self, name: str, expert: int) -> Array:
        """Those of one of stacked experts."""
        return self.spec.numbers(expert)

    def close(self) -> None:
        """Lets go of the files."""
        for file, _ in self.parts.found.values():
            file.close()


def whole_number(config: object, key: str, where: str, *, least: int = 1) -> int:
    """A positive whole number out of quantization_config; UnsupportedError for anything else."""
    if type(config) is not int or config < least:
        raise UnsupportedError(f"{where}: quantization_config's {key} is {config!r:.80}")
    return config
