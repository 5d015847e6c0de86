"""What a backend makes of its single operations: work that comes again, rows, many arrays at once.

`Backend.repeated()` gives an object with the methods of `Repeated`, for one model: it runs work
that comes again with other numbers, such as a training step. `Direct` is its reference: it runs
what it is given. A GPU's backend may record the work and replay it (cuda_steps).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from pylora.errors import DtypeError, ShapeError
from pylora.types import AdamW, Array, LoRA, Residue, Seqs

Results = dict[Any, Array]  # by any name
Work = Callable[[Sequence[Array], Seqs], Results]


class Repeated(Protocol):
    """What `Backend.repeated` returns."""

    def run(self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        """work(arrays, seqs), the host's arrays placed where the backend computes.

        Two calls of one key may differ in the numbers in `arrays` and `seqs` alone: what else the
        work depends on is part of the key, objects by identity. None: it is run, never replayed.
        Work that has a key uses the backend's operations on its arrays and nothing else, and may
        not look at a number of theirs. The results belong to the caller.
        """

    def clear(self) -> None:
        """Lets go of everything that is kept."""


class Direct:
    """`Repeated` that keeps nothing."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def run(self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        return work([self.ops.xp.asarray(a) for a in arrays], seqs)

    def clear(self) -> None:
        pass


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
        if not W.flags.writeable:
            raise ShapeError("W is merged into in place, but the array is read-only")
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
