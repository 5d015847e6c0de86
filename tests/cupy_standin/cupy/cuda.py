"""cupy.cuda of the stand-in: streams that run what they are given at once, and graphs.

A stream of the emulated CUDA library captures what that library is asked to do. Where no such
library is loaded, a stream cannot capture.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import numpy as np

from cupy._array import capturing, pools

emulated: ctypes.CDLL | None = None  # set by whoever loads libpylora_cuda_emulated
has_device = True


def _check(status: int, what: str) -> None:
    if status:
        raise runtime.CUDARuntimeError(f"{what}: {status}")


class Graph:
    def __init__(self, pointer: int) -> None:
        self._exec = ctypes.c_void_p()
        assert emulated is not None
        f = emulated.cudaGraphInstantiate
        _check(
            f(ctypes.byref(self._exec), ctypes.c_void_p(pointer), ctypes.c_ulonglong(0)), "graph"
        )
        self.launches = 0

    def launch(self, stream: Any = None) -> None:
        assert emulated is not None
        stream = get_current_stream() if stream is None else stream
        self.launches += 1
        _check(emulated.cudaGraphLaunch(self._exec, ctypes.c_void_p(stream.ptr)), "launch")

    def upload(self, stream: Any = None) -> None:
        pass


class Stream:
    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr, self._before = 0, []
        if not null and emulated is not None:
            p = ctypes.c_void_p()
            _check(emulated.cudaStreamCreate(ctypes.byref(p)), "stream")
            self.ptr = int(p.value or 0)

    def use(self) -> Stream:
        _current[0] = self
        return self

    def __enter__(self) -> Stream:
        self._before.append(_current[0])
        _current[0] = self
        return self

    def __exit__(self, *exc: Any) -> None:
        _current[0] = self._before.pop()

    def synchronize(self) -> None:
        if capturing:
            raise runtime.CUDARuntimeError("cudaStreamSynchronize while capturing")

    def record(self, event: Any = None) -> Any:
        return event if event is not None else Event()

    def wait_event(self, event: Any) -> None:
        pass

    def begin_capture(self, mode: int = 0) -> None:
        if self.ptr == 0 or emulated is None:
            raise RuntimeError("cannot capture the default stream")
        _check(emulated.cudaStreamBeginCapture(ctypes.c_void_p(self.ptr), mode), "begin_capture")
        capturing.append(self)

    def end_capture(self) -> Graph:
        assert emulated is not None
        capturing.remove(self)
        graph = ctypes.c_void_p()
        f = emulated.cudaStreamEndCapture
        _check(f(ctypes.c_void_p(self.ptr), ctypes.byref(graph)), "end_capture")
        return Graph(int(graph.value or 0))

    def is_capturing(self) -> bool:
        return self in capturing


def clear(a: np.ndarray) -> None:
    """Zeros, as CuPy makes them: a memset of the current stream, which can be captured."""
    stream = get_current_stream()
    if stream not in capturing:
        a.reshape(-1).view(np.uint8)[...] = 0
        return
    assert emulated is not None
    p, n = ctypes.c_void_p(a.__array_interface__["data"][0]), ctypes.c_size_t(a.nbytes)
    _check(emulated.cudaMemsetAsync(p, 0, n, ctypes.c_void_p(stream.ptr)), "memset")


class Event:
    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


Stream.null = Stream(null=True)  # type: ignore[attr-defined]
_current = [Stream.null]  # type: ignore[attr-defined]


def get_current_stream() -> Stream:
    return _current[0]


class Device:
    def __init__(self, device: int | None = None) -> None:
        self.id = runtime.device if device is None else device
        self.compute_capability = "90"
        self.mem_info = runtime.memGetInfo()

    def use(self) -> None:
        if not 0 <= self.id < runtime.getDeviceCount():
            raise runtime.CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        runtime.device = self.id

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class MemoryPool:
    def __init__(self, allocator: Any = None) -> None:
        self.kept: list[np.ndarray] = []  # memory that goes back to nobody

    def malloc(self, size: int) -> Any:
        raise NotImplementedError("the stand-in's arrays ask using_allocator whose memory they are")

    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return sum(a.nbytes for a in self.kept)

    def free_all_blocks(self) -> None:
        pass


_pool = MemoryPool()


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Any:
    pools.append(allocator.__self__)
    try:
        yield
    finally:
        pools.pop()


class runtime:
    class CUDARuntimeError(RuntimeError):
        pass

    free_bytes, total_bytes = 1 << 34, 1 << 35
    device = 0  # the current one

    @staticmethod
    def getDevice() -> int:
        return runtime.device

    @staticmethod
    def getDeviceCount() -> int:
        if not has_device:
            raise runtime.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return 1

    @staticmethod
    def memGetInfo() -> tuple[int, int]:
        return runtime.free_bytes, runtime.total_bytes

    @staticmethod
    def getDeviceProperties(device: int) -> dict[str, Any]:
        return {"name": b"CuPy stand-in", "totalGlobalMem": runtime.total_bytes}

    @staticmethod
    def runtimeGetVersion() -> int:
        return 13000

    @staticmethod
    def driverGetVersion() -> int:
        return 13000

    streamCaptureModeGlobal, streamCaptureModeThreadLocal, streamCaptureModeRelaxed = 0, 1, 2


kernels: ctypes.CDLL | None = None  # libpylora_kernels_emulated: what NVRTC would have compiled


class RawModule:
    """The kernels of csrc/cuda/kernels.cu, compiled for the host beforehand, by name. Where no such
    library is loaded compiling fails, as it does where NVRTC is missing."""

    def __init__(self, *, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc") -> None:
        self.code = code

    def compile(self) -> None:
        if kernels is None:
            raise RuntimeError("the stand-in has no NVRTC")

    def get_function(self, name: str) -> Any:
        self.compile()
        return functools.partial(_launch, name)


def _argument(a: Any) -> tuple[Any, int]:
    """(what lives, size) of a kernel's argument, as CuPy 14 passes it."""
    from cupy._array import ndarray

    if isinstance(a, ndarray):
        return ctypes.c_void_p(a.data.ptr), 8
    if isinstance(a, np.ndarray):  # a struct by value
        if a.dtype.names is None or a.size != 1:
            raise TypeError("of NumPy's arrays a kernel takes structures of one element")
        held = ctypes.create_string_buffer(a.tobytes(), a.nbytes)
        return held, a.nbytes
    if isinstance(a, np.generic):
        return ctypes.create_string_buffer(a.tobytes(), a.itemsize), a.itemsize
    raise TypeError(f"Unsupported type {type(a)}")


def _launch(
    name: str, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...],
    *, shared_mem: int = 0,
) -> None:  # fmt: skip
    assert kernels is not None
    held = [_argument(a) for a in args]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(h) for h, _ in held))
    sizes = (ctypes.c_size_t * len(held))(*(n for _, n in held))
    three = [(ctypes.c_uint * 3)(*(tuple(d) + (1, 1, 1))[:3]) for d in (grid, block)]
    status = kernels.emulated_launch_by_name(
        name.encode(), *three, ctypes.c_size_t(shared_mem),
        ctypes.c_void_p(get_current_stream().ptr), pointers, sizes, ctypes.c_size_t(len(held)),
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"{name}: launch failed with {status} (-1: no such kernel, -2: arguments)"
        )
