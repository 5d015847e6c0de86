"""Operations that are made of a backend's others: on many arrays at once, in place, on rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from pylora.backends.repeat import Direct, Repeated
from pylora.errors import DtypeError, ShapeError
from pylora.types import AdamW, Array, LoRA, Residue


def want_writable(W: Array) -> None:
    """ShapeError for a weight in host memory that may not be written to."""
    if isinstance(W, np.ndarray) and not W.flags.writeable:
        raise ShapeError("W is merged into in place, but the array is read-only")


class _Single(Protocol):
    """What the operations of `Plain` are made of."""

    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None: ...

    def sum_squares(self, x: Array) -> float: ...

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]: ...


class Plain:
    """Operations that are made of others, for a backend that has no better."""

    def merge_in_place(self: _Single, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        """W becomes the weight that `merge` gives. What rounding loses is not kept, so that no
        `unmerge` of it is exact."""
        want_writable(W)
        merged, _ = self.merge(W, lora, dtype)
        if merged.dtype != W.dtype:
            raise DtypeError(f"W: stored as {dtype} must be an array of {merged.dtype}")
        W[...] = merged

    def adamw_steps(
        self: _Single, updates: Sequence[tuple[Array, Array, Array, Array, AdamW]]
    ) -> None:
        """`adamw_step` of each (param, grad, m, v, settings); a backend may do them together."""
        for update in updates:
            self.adamw_step(*update)

    def total_squares(self: _Single, arrays: Sequence[Array]) -> float:
        """The sums of squares of the arrays, added up in order in float64."""
        return sum(self.sum_squares(x) for x in arrays)

    def repeated(self) -> Repeated:
        return Direct(self)

    def take_rows(self, x: Array, rows: Array) -> Array:
        """x[rows]; rows int64, where the backend computes."""
        return x[rows]

    def put_rows(self, y: Array, rows: Array, x: Array) -> None:
        """y[rows] = x, in y's type; each row once."""
        y[rows] = x
