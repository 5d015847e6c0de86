"""What every group of operations on the C core stands on: the run time (kernel table, threads),
arrays, and the workspace that an operation runs in. It computes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.marshal import F32, Scratch, check
from pylora.backends.c.pool import Pool
from pylora.backends.c.slabs import Slabs
from pylora.errors import BackendError, DtypeError
from pylora.numbers.precision import BF16

_ATTEMPTS = 8  # at a workspace, should another thread change the number of threads meanwhile


class Core:
    """Settings, memory and the way into the compiled core."""

    name = "c"
    head_rows = 128  # their logits stay in the cache
    bitwise = True
    xp: Any = np

    def __init__(self) -> None:
        wanted = os.environ.get("PYLORA_ISA")
        if wanted and wanted not in self.isas():
            raise BackendError(
                f"PYLORA_ISA={wanted!r} is not available here; "
                f"choose one of {', '.join(self.isas())}"
            )
        threads = os.environ.get("PYLORA_NUM_THREADS", "").strip()
        if threads and not (threads.isdecimal() and 1 <= int(threads[:9]) <= 256):
            raise BackendError(f"PYLORA_NUM_THREADS={threads!r} is not a number from 1 to 256")
        self._pool, self._slabs = Pool(ffi), Slabs()
        # Adapters of one size follow each other in the same blocks, many in one large allocation.
        self.resident = Pool(ffi, Slabs().take)
        self._scratch = Scratch()

    @staticmethod
    def isas() -> list[str]:
        """The kernel tables that this build has and this CPU can run, best first."""
        names: list[str] = []
        while (name := lib.pylora_isa_name(len(names))) != ffi.NULL:
            names.append(ffi.string(name).decode())
        return names

    @property
    def isa(self) -> str:
        return str(ffi.string(lib.pylora_isa()).decode())

    def use_isa(self, name: str) -> None:
        """Switches the kernel table of the whole process. BackendError if it is not available."""
        if lib.pylora_use_isa(name.encode()):
            raise BackendError(
                f"no kernel table {name!r} here; choose one of {', '.join(self.isas())}"
            )

    @property
    def num_threads(self) -> int:
        return int(lib.pylora_num_threads())

    def set_num_threads(self, n: int) -> None:
        """Threads per operation, 1 to 256. It changes no bit of any result."""
        whole = isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 256
        if not whole or lib.pylora_set_num_threads(n):
            raise BackendError(f"the number of threads must be from 1 to 256, got {n!r}")

    def asarray(self, a: Any) -> np.ndarray:
        """A C-contiguous float32 array of `a`; other dtypes are refused, not converted."""
        array = np.asarray(a, order="C")
        if array.dtype != F32:
            raise DtypeError(
                f"the c backend computes in float32, got {array.dtype}; convert it first"
            )
        return array

    def to_numpy(self, a: np.ndarray) -> np.ndarray:
        return a

    def place(self, a: np.ndarray) -> np.ndarray:
        return a

    def check_room(self, nbytes: int) -> None:
        pass

    def assign(self, a: np.ndarray, values: np.ndarray) -> None:
        a[...] = values

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return self._pool.empty((shape,) if isinstance(shape, int) else shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        a = self.empty(shape, dtype)
        (a.view(np.uint16) if a.dtype == BF16 else a).fill(0)
        return a

    def trim(self) -> None:
        """Gives the memory of dead arrays back to the system."""
        self._pool.trim()

    def memory(self) -> dict[str, int]:
        """Of arrays of 64 KiB and more: bytes in use, free and at the peak, and how many blocks
        were asked of the system. Once a step has run, the next one like it asks for none."""
        p = self._pool
        return {
            "used": p.used_bytes, "free": p.free_bytes, "peak": p.peak_bytes, "misses": p.misses,
        }  # fmt: skip

    def _in_scratch(
        self,
        op: str,
        needed: Callable[..., int],
        sizes: tuple[Any, ...],
        run: Callable[..., int],
        args: tuple[Any, ...],
    ) -> None:
        """Runs an operation in this thread's workspace. One that is too small is refused before
        anything is written that the operation reads; then it grows to what is needed. That depends
        on the number of threads, which another Python thread may change: so perhaps not only once.
        """
        status, left = run(*args, *self._scratch.room), _ATTEMPTS
        while status == lib.PYLORA_E_WORKSPACE and left and (need := needed(*sizes)):
            status = run(*args, *self._scratch.at_least(need))
            left -= 1
        check(status, op)
