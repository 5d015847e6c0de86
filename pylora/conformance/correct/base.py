"""What the parts of the correct implementation share: the operations, and dtypes of 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.conformance.protocol import LoraTriple
from pylora.reference import Reference
from pylora.types import Array, LoRA


class Base:
    """bfloat16 and float16 are computed in float32 and rounded once."""

    ops: Any = Reference()

    def widen(self, a: Array | None) -> Any:
        """16 bits as float32; contiguous, since NumPy's products depend on the layout."""
        if a is None:
            return None
        return np.ascontiguousarray(a.astype(np.float32) if a.dtype.itemsize == 2 else a)

    def pack(self, W: Array) -> Any:
        """A weight as `ops` takes it. The reference takes arrays."""
        return self.widen(W)

    def as_lora(self, triple: LoraTriple) -> LoRA:
        """(A, B, scale) as `ops` takes it."""
        A, B, scale = triple
        return LoRA(self.widen(A), self.widen(B), scale)

    def file_dtype(self, W: Array) -> str:
        if W.dtype.itemsize != 2:
            return "f32"
        return "f16" if W.dtype == np.float16 else "bf16"

    def as_bits(self, W: Array) -> Array:
        """W itself, or the uint16 bits of a bfloat16 array."""
        return np.ascontiguousarray(W).view(np.uint16) if self.file_dtype(W) == "bf16" else W

    def stored_values(self, W: Array) -> Array:
        """The values that are kept of W, widened."""
        stored = getattr(self, "stored", None)
        return self.widen(W if stored is None else stored(W))


def by_adapter(rows: Sequence[int] | Array, adapters: int) -> Mapping[int, Array]:
    """Which rows each adapter has, -1 the base. IndexError for a row that names none."""
    index = np.asarray(rows)
    if index.size and not (-1 <= int(index.min()) and int(index.max()) < adapters):
        raise IndexError(f"rows name {index.min()} .. {index.max()}; there are {adapters} adapters")
    return {int(i): np.flatnonzero(index == i) for i in np.unique(index)}
