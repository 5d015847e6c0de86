"""Arrays whose memory goes back to a list when the last view of them dies.

A training step makes and drops the same large arrays again and again; the system's allocator would
return their pages and fault them in anew each time, which costs as much as the arithmetic on them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

SMALL = 1 << 16  # bytes; below this NumPy's own allocator is as good
_FEW = SMALL // 8  # numbers: no need to look at their size
_SLACK = 1 << 25


class Pool:
    """Free blocks by size class. `ffi` gives buffers with a destructor.

    Used and free memory together stay below 9/8 of the most that was ever in use at once, or 32 MiB
    above it, so that a step whose arrays are of many sizes finds a block of each again.
    """

    def __init__(self, ffi: Any, system: Callable[[int], np.ndarray] | None = None) -> None:
        """`system` gives n bytes of fresh memory, uint8."""
        self._ffi = ffi
        self._system = system or (lambda n: np.empty(n, np.uint8))
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.RLock()  # a destructor may run inside another method of this thread
        self.free_bytes = self.used_bytes = self.peak_bytes = 0
        self.misses = 0  # blocks that were asked of the system

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """An uninitialised C-contiguous array, 64-byte aligned where it comes from the pool."""
        count = math.prod(shape)
        if count < _FEW:
            return np.empty(shape, dtype)
        dt = np.dtype(dtype)
        nbytes = count * dt.itemsize
        if nbytes < SMALL:
            return np.empty(shape, dt)
        size = _size_class(nbytes)
        with self._lock:
            blocks = self._free.get(size)
            if blocks:
                block = blocks.pop()
                self.free_bytes -= size
            else:
                slack = max(self.peak_bytes // 8, _SLACK)
                self._trim(max(0, self.peak_bytes + slack - self.used_bytes - size))
                block = self._system(size + 64)
                self.misses += 1
            self.used_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        address = block.__array_interface__["data"][0]
        pointer = self._ffi.cast("char *", address + (-address) % 64)
        owner = self._ffi.gc(pointer, lambda _: self._give_back(block, size))
        return np.frombuffer(self._ffi.buffer(owner, nbytes), dt).reshape(shape)

    def _give_back(self, block: np.ndarray, size: int) -> None:
        with self._lock:
            self._free.setdefault(size, []).append(block)
            self.free_bytes += size
            self.used_bytes -= size

    def _trim(self, keep: int) -> None:
        """Returns free blocks to the system, the largest first, until `keep` bytes are left."""
        for size in sorted(self._free, reverse=True):
            blocks = self._free[size]
            while blocks and self.free_bytes > keep:
                blocks.pop()
                self.free_bytes -= size

    def trim(self) -> None:
        """Returns all free blocks to the system and forgets the peak."""
        with self._lock:
            self._trim(0)
            self.peak_bytes = self.used_bytes


def _size_class(nbytes: int) -> int:
    """nbytes rounded up to one of eight steps per power of two."""
    step = 1 << max(12, nbytes.bit_length() - 4)
    return -(-nbytes // step) * step
