"""The memory of all keys and values that are kept: extents of rows in one KV cache.

Attention reads the rows of a sequence side by side, whatever backend it is; so a sequence has one
extent, in units of `BLOCK` rows. It grows in place where the rows behind it are free, and else
moves: a copy, which costs a thousandth of computing the same rows and changes no bit. Which
sequence gets memory, and which has to give it up, is decided elsewhere (scheduler.py).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.model.kvcache import KVCache
from pylora.model.llama import Llama
from pylora.numbers.precision import BF16

BLOCK = 16  # rows; what is asked for is rounded up to it
_AT_ONCE = 256  # rows that are copied at a time where source and destination overlap


def row_bytes(model: Llama) -> int:
    """Bytes of memory that the keys and values of one token take."""
    dtype = model.dtype if model.activation_dtype is None else model.activation_dtype
    c = model.config
    return 2 * c.num_hidden_layers * c.kv_size * np.dtype(dtype).itemsize


@dataclass(eq=False)
class Extent:
    """Rows start .. start + size - 1 of the arena."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class Arena:
    """`rows` rows of keys and values, and who has which."""

    def __init__(self, model: Llama, rows: int, slots: int) -> None:
        """`slots`: so many sequences may run at once."""
        self.rows = rows - rows % BLOCK
        dtype = model.dtype if model.activation_dtype is None else model.activation_dtype
        most = min(self.rows, model.config.max_positions)
        self.kv = KVCache(
            model.config, slots, most, ops=model.ops, dtype=dtype, rows=self.rows
        )  # fmt: skip
        # NumPy copies the structured dtype of bfloat16 field by field.
        arrays = [*self.kv.k, *self.kv.v]
        self._arrays: list[Any] = [a.view(np.uint16) if a.dtype == BF16 else a for a in arrays]
        self._extents: list[Extent] = []  # by start
        self.moved_rows = 0

    @property
    def used(self) -> int:
        """Rows that belong to somebody."""
        return sum(extent.size for extent in self._extents)

    # ---- taking and giving back ---------------------------------------------------------------

    def take(self, rows: int) -> Extent | None:
        """An extent of at least so many rows, in the smallest gap that has them; None without."""
        size, best, at = rounded(rows), self.rows + 1, -1
        last = 0
        for start, end in self._bounds():
            if size <= start - last < best:
                best, at = start - last, last
            last = end
        if at < 0:
            return None
        extent = Extent(at, size)
        insort(self._extents, extent, key=_start)
        return extent

    def give(self, extent: Extent) -> None:
        """Back, all of it."""
        self._extents.remove(extent)

    def shrink(self, extent: Extent, rows: int) -> None:
        """Back, but for the first `rows` rows."""
        extent.size = min(extent.size, rounded(rows))

    def extend(self, extent: Extent, rows: int) -> bool:
        """Makes it so long where it is, if what lies behind it is free."""
        size = rounded(rows)
        i = self._extents.index(extent)
        end = self._extents[i + 1].start if i + 1 < len(self._extents) else self.rows
        if extent.start + size > end:
            return False
        extent.size = max(size, extent.size)
        return True

    def compact(self, behind: Extent | None = None) -> None:
        """Slides extents together, so that what is free is one piece: behind the given extent, or
        at the end."""
        last = 0
        n = len(self._extents) if behind is None else self._extents.index(behind) + 1
        for extent in self._extents[:n]:
            self._slide(extent, last)
            last = extent.end
        last = self.rows
        for extent in reversed(self._extents[n:]):
            last -= extent.size
            self._slide(extent, last)

    def _slide(self, extent: Extent, to: int) -> None:
        if extent.start != to:
            self.copy(extent.start, to, extent.size)
            extent.start = to

    def _bounds(self) -> list[tuple[int, int]]:
        return [(e.start, e.end) for e in self._extents] + [(self.rows, self.rows)]

    # ---- contents -----------------------------------------------------------------------------

    def copy(self, source: int, to: int, rows: int) -> None:
        """Rows source .. source + rows - 1 of every layer, to `to` and on; both may overlap."""
        apart = abs(source - to)
        step = rows if apart >= rows else max(1, min(_AT_ONCE, apart))
        parts = range(0, rows, max(step, 1))
        for a in parts if to < source else reversed(parts):  # none is written before it is read
            n = min(step, rows - a)
            for array in self._arrays:
                array[to + a : to + a + n] = array[source + a : source + a + n]
        self.moved_rows += rows

    def move(self, extent: Extent, to: Extent, rows: int) -> None:
        """The first `rows` rows of an extent into another one, which becomes the first: it is at
        `to`'s place afterwards, and `to` is gone."""
        self.copy(extent.start, to.start, rows)
        self._extents.remove(to)
        self._extents.remove(extent)
        extent.start, extent.size = to.start, to.size
        insort(self._extents, extent, key=_start)

    def place(self, slot: int, extent: Extent, length: int) -> None:
        """Slot `slot` has these rows now, with `length` tokens in them."""
        self.kv.start[slot], self.kv.room[slot] = extent.start, extent.size
        self.kv.length[slot] = length


def rounded(rows: int) -> int:
    """So many rows in whole blocks; at least one."""
    return -(-max(rows, 1) // BLOCK) * BLOCK


def _start(extent: Extent) -> int:
    return extent.start
