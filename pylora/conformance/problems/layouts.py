"""How an array may lie in memory: the same numbers, in each way that NumPy can hold them.

`laid_out(a, layout)` gives the numbers of `a` in a layout; around and between them is NaN (or, in
integers, the largest number), so that what is read beyond is seen. `guarded` also tells whether
the memory around was written to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pylora.types import Array

# Beside "C", which everybody serves. "broadcast" repeats its first row or column with a stride of
# 0, so that its numbers are others than a's.
LAYOUTS = (
    "F",
    "stepped",
    "negative",
    "readonly",
    "part",
    "columns",
    "every other row",
    "upside down",
    "mirrored",
    "offset",
    "unaligned",
    "broadcast rows",
    "broadcast columns",
)


def _filled(shape: tuple[int, ...], like: Array) -> Array:
    fill = np.iinfo(like.dtype).max if like.dtype.kind in "iu" else np.nan
    return np.full(shape, fill, like.dtype)


def _inside(a: Array, shape: tuple[int, ...], at: tuple[slice, ...]) -> Array:
    """`a` put at `at` of a larger array of NaN: the view."""
    around = _filled(shape, a)
    around[at] = a
    view: Array = around[at]
    return view


def _unaligned(a: Array) -> Array:
    """At an address that is no multiple of the element's size."""
    buffer = np.full(a.nbytes + 1, 0xFF, np.uint8)
    buffer[1:] = np.frombuffer(np.ascontiguousarray(a).tobytes(), np.uint8)
    view: Array = buffer[1:].view(a.dtype).reshape(a.shape)
    return view


def _readonly(a: Array) -> Array:
    a = a.copy()
    a.flags.writeable = False
    return a


def _broadcast_columns(a: Array) -> Array:
    return np.broadcast_to(a[:, :1], a.shape)


_TWO: dict[str, Callable[[Array], Array]] = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "stepped": lambda a: _inside(
        a, (2 * a.shape[0], 2 * a.shape[1]), (slice(None, None, 2), slice(None, None, 2))
    ),
    "negative": lambda a: _inside(
        a[::-1, ::-1], (a.shape[0], a.shape[1]), (slice(None), slice(None))
    )[::-1, ::-1],
    "readonly": _readonly,
    # In the middle of an array, and the left columns of a wider one.
    "part": lambda a: _inside(a, (a.shape[0] + 2, a.shape[1]), (slice(1, -1), slice(None))),
    "columns": lambda a: _inside(
        a, (a.shape[0], a.shape[1] + 3), (slice(None), slice(0, a.shape[1]))
    ),
    "every other row": lambda a: _inside(
        a, (2 * a.shape[0], a.shape[1]), (slice(None, None, 2), slice(None))
    ),
    "upside down": lambda a: _inside(a[::-1], a.shape, (slice(None), slice(None)))[::-1],
    "mirrored": lambda a: _inside(a[:, ::-1], a.shape, (slice(None), slice(None)))[:, ::-1],
    # Aligned to the element and to nothing more, in the middle of both axes.
    "offset": lambda a: _inside(
        a, (a.shape[0] + 2, a.shape[1] + 3), (slice(1, -1), slice(1, a.shape[1] + 1))
    ),
    "unaligned": _unaligned,
    "broadcast rows": lambda a: np.broadcast_to(a[:1], a.shape),
    "broadcast columns": _broadcast_columns,
}
_ONE: dict[str, Callable[[Array], Array]] = {
    "C": np.ascontiguousarray,
    "readonly": _readonly,
    "unaligned": _unaligned,
    "stepped": lambda a: _inside(a, (2 * len(a),), (slice(None, None, 2),)),
    "negative": lambda a: a[::-1].copy()[::-1],
    "part": lambda a: _inside(a, (len(a) + 2,), (slice(1, -1),)),
    "broadcast columns": lambda a: np.broadcast_to(a[:1], a.shape),
}


def laid_out(a: Array, layout: str) -> Array:
    """The numbers of `a` [rows, columns] or [n] in memory as one of LAYOUTS, or "C", says.

    A layout that does not exist for an array of this rank, or of no elements, leaves it alone."""
    ways = {1: _ONE, 2: _TWO}.get(a.ndim, {})
    return ways[layout](a) if layout in ways and a.size else a


@dataclass(frozen=True)
class Guard:
    """The memory that an array is a part of, as it was."""

    memory: Array
    before: bytes

    @classmethod
    def of(cls, a: Array) -> Guard:
        memory = a
        while isinstance(memory.base, np.ndarray):
            memory = memory.base
        return cls(memory, memory.tobytes())

    @property
    def untouched(self) -> bool:
        """Whether it has the same bits still."""
        return bool(self.memory.tobytes() == self.before)
