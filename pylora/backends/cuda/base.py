"""What every group of operations on libpylora_cuda stands on: the device and its library, how a
function of it is called, workspaces, arrays and index arrays. It computes nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pylora.backends.cuda.library import library
from pylora.backends.cuda.marshal import F32, Marshal, aligned, want
from pylora.backends.device import DeviceArrays, open_cupy
from pylora.errors import BackendError, DtypeError
from pylora.types import Array


class _Own(threading.local):
    """What a thread that captures a graph takes memory from: workspaces, and where gradients go."""

    workspaces: list[Array] | None = None
    results: Array | None = None
    used = 0


class Device(DeviceArrays):
    """One GPU, its library, and what is queued on it."""

    name = "cuda"

    def __init__(self, device: int | None = None) -> None:
        """On a GPU by its number; default: PYLORA_CUDA_DEVICE, else CuPy's current one. It becomes
        CuPy's current device of this thread, as that is where arrays are made."""
        self.cuda = library()
        self.xp = open_cupy()
        if device is None:
            device = _device_asked_for()
        if device is None:
            device = int(self.xp.cuda.Device().id)
        count = self.cuda.devices()
        if not 0 <= device < count:
            raise BackendError(f"there is no GPU {device}; {self.cuda.error() or f'{count} found'}")
        self.device = device
        self.xp.cuda.Device(device).use()
        self.context = self.cuda.open(device)
        self.ffi, self.lib = self.cuda.ffi, self.cuda.lib
        self.to = Marshal(self.xp, self.ffi)
        self._workspaces: dict[tuple[int, int], Array] = {}
        self._own = _Own()
        self.tf32 = False

    @property
    def _stream(self) -> Any:
        return self.ffi.cast("void *", self.xp.cuda.get_current_stream().ptr)

    def call(self, op: str, *args: Any) -> None:
        """pylora_cuda_<op>(context, stream, ...)"""
        if (now := self.xp.cuda.runtime.getDevice()) != self.device:
            raise BackendError(
                f"{op}: CuPy's current device in this thread is {now}, and the backend's is "
                f"{self.device}; call cupy.cuda.Device({self.device}).use() in it first"
            )
        function = getattr(self.lib, f"pylora_cuda_{op}")
        self.cuda.check(function(self.context, self._stream, *args), op)

    def workspace(self, nbytes: int) -> tuple[Any, int]:
        """Device memory of the current stream for the length of one operation; each thread has its
        own, since another's might be let go before the operation is queued."""
        key = threading.get_ident(), int(self.xp.cuda.get_current_stream().ptr)
        own = self._own.workspaces
        if own is not None:  # what one operation has used the next may use
            if not own or own[-1].nbytes < nbytes:
                own.append(self.xp.empty(max(nbytes, 1 << 16), np.uint8))
            return self.to.at(own[-1], "void *"), int(own[-1].nbytes)
        held = self._workspaces.get(key)
        if held is None or held.nbytes < nbytes:
            held = self._workspaces[key] = self.xp.empty(max(nbytes, 1 << 16), np.uint8)
        return self.to.at(held, "void *"), int(held.nbytes)

    @contextmanager
    def own_workspace(self, results: Array | None = None) -> Iterator[list[Array]]:
        """While this thread captures a graph: its workspaces are no one else's. They are what is
        yielded. Adapters' gradients are laid one behind the other in `results`, while it lasts."""
        own = self._own
        own.workspaces, own.results, own.used = [], results, 0
        try:
            yield own.workspaces
        finally:
            own.workspaces = own.results = None

    def _gradient(self, shape: tuple[int, int]) -> Array:
        """Memory of a gradient of A or B."""
        own, size = self._own, 4 * shape[0] * shape[1]
        if own.results is None or own.used + size > own.results.nbytes:
            return self.empty(shape)
        first, own.used = own.used, own.used + aligned(size)
        return own.results[first : first + size].view(F32).reshape(shape)

    def asarray(self, a: Any) -> Array:
        """A C-contiguous float32 array of `a` on the GPU; other dtypes are refused."""
        array = self.xp.ascontiguousarray(self.on_device(a))
        if array.dtype != F32:
            raise DtypeError(
                f"the cuda backend computes in float32, got {array.dtype}; convert it first"
            )
        return array

    def to_numpy(self, a: Any) -> np.ndarray:
        if not isinstance(a, np.ndarray):
            self.cuda.check(self.lib.pylora_cuda_check(self.context, self._stream), "cuda")
        return super().to_numpy(a)

    def allow_tf32(self, allow: bool) -> None:
        """Lets float32 products round their factors to TF32 (10 bits); off unless asked for."""
        self.cuda.check(self.lib.pylora_cuda_set_tf32(self.context, allow), "set_tf32")
        self.tf32 = allow

    def _index(self, what: str, a: Any, n: int, limit: int) -> Array:
        """int64 [n] on the device, checked where it comes from the host."""
        on_device = isinstance(a, self.xp.ndarray)
        index = a if on_device else self.checked_index(what, a, limit)
        if index.dtype != np.int64:
            index = index.astype(np.int64)
        want(what, index, (n,))
        return self.xp.ascontiguousarray(index)


def _device_asked_for() -> int | None:
    """PYLORA_CUDA_DEVICE, if it is set."""
    text = os.environ.get("PYLORA_CUDA_DEVICE")
    if not text:
        return None
    if not text.strip().isdecimal():
        raise BackendError(f"PYLORA_CUDA_DEVICE is {text!r}; it must be the number of a GPU, as 0")
    return int(text)
