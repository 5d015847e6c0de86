"""Memory for packed weights and adapters: many of them share one large allocation.

NumPy asks Linux for huge pages where an array has 4 MiB or more; a single weight of a small
model has less. Reading the weights is what bounds decoding, and both the translation of addresses
and the hardware's prefetching end at a page. A slab goes back to the system when the last weight
in it dies (or adapter: a pool hands their pieces out again meanwhile).
"""

from __future__ import annotations

import threading
import weakref

import numpy as np

SLAB = 1 << 25  # bytes
_SMALL = 1 << 14  # weights below this gain nothing
_ALIGN = 64


class Slabs:
    """Hands out pieces of slabs, one behind the other; none is ever handed out again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab: weakref.ref[np.ndarray] | None = None  # the weights hold it
        self._used = 0

    def take(self, nbytes: int) -> np.ndarray:
        """Uninitialised bytes, 64-byte aligned."""
        if nbytes < _SMALL or nbytes > SLAB // 4:
            return _aligned(np.empty(nbytes + _ALIGN, np.uint8), 0, nbytes)
        with self._lock:
            slab = self._slab() if self._slab is not None else None
            if slab is None or self._used + nbytes > SLAB:
                slab = np.empty(SLAB + _ALIGN, np.uint8)
                self._slab, self._used = weakref.ref(slab), 0
            piece = _aligned(slab, self._used, nbytes)
            self._used += nbytes + -nbytes % _ALIGN
        return piece


def _aligned(buffer: np.ndarray, start: int, nbytes: int) -> np.ndarray:
    offset = -buffer.__array_interface__["data"][0] % _ALIGN
    return buffer[offset + start : offset + start + nbytes]
