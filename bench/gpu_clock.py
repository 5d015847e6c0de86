"""Time and memory of a GPU for bench/gpu.py: CUDA events on one stream that every contender uses.

PyTorch and CuPy both hand out streams and keep memory. Where there is no GPU and small shapes were
asked for, the host's clock stands in, which shows that the programs run.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any


def out_of_memory(error: Exception) -> bool:
    return "OutOfMemory" in type(error).__name__ or "out of memory" in str(error).lower()


def make(allow_host: bool) -> Any:
    """The clock of the first GPU. RuntimeError without one, unless `allow_host`."""
    try:
        return GpuClock()
    except Exception as error:
        if allow_host:
            return HostClock()
        raise RuntimeError(
            f"bench/gpu.py needs an NVIDIA GPU and CuPy ({error}); without, use --tiny"
        ) from error


class GpuClock:
    """CuPy's events; PyTorch, where it is there, runs on the same stream."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(0)
        self.device = properties["name"].decode()
        self.driver = cupy.cuda.runtime.driverGetVersion()
        try:
            import torch

            self.torch: Any = torch if torch.cuda.is_available() else None
        except ImportError:
            self.torch = None

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """One stream, not the default one: that cannot be captured."""
        if self.torch is None:
            with self.cupy.cuda.Stream(non_blocking=True):
                yield
            return
        stream = self.torch.cuda.Stream()
        with (
            self.torch.cuda.stream(stream),
            self.cupy.cuda.ExternalStream(stream.cuda_stream),
        ):
            yield

    def seconds(self, job: Callable[[], Any]) -> float:
        first, last = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        stream = self.cupy.cuda.get_current_stream()
        stream.synchronize()
        first.record(stream)
        job()
        last.record(stream)
        last.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(first, last)) / 1e3

    # ---- memory: what each of the two holds of the device at most ------------------------------

    def start_memory(self) -> None:
        self.free()
        self.before = self._held()
        if self.torch is not None:
            self.torch.cuda.reset_peak_memory_stats()

    def _held(self) -> int:
        held = int(self.cupy.get_default_memory_pool().total_bytes())
        return held + (int(self.torch.cuda.memory_reserved()) if self.torch is not None else 0)

    def peak_memory(self) -> int:
        """Bytes taken of the device since `start_memory`, at most: neither gives any back."""
        held = int(self.cupy.get_default_memory_pool().total_bytes())
        if self.torch is not None:
            held += int(self.torch.cuda.max_memory_reserved())
        return held - self.before

    def free(self) -> None:
        gc.collect()
        self.cupy.cuda.get_current_stream().synchronize()
        self.cupy.get_default_memory_pool().free_all_blocks()
        if self.torch is not None:
            self.torch.cuda.empty_cache()

    def ceilings(self, size: int) -> dict[str, Callable[[], Any]]:
        """A large product in bfloat16 (PyTorch's, i.e. cuBLAS) and a large copy."""
        cp = self.cupy
        source = cp.zeros(size**2 * 8, cp.uint32)
        source[...] = cp.arange(source.size, dtype=cp.uint32)
        to = cp.empty_like(source)
        jobs: dict[str, Callable[[], Any]] = {"copy": lambda: cp.copyto(to, source)}
        if self.torch is not None:
            a, b = (
                self.torch.randn(size, size, device="cuda", dtype=self.torch.bfloat16)
                for _ in range(2)
            )
            jobs["bf16 product"] = lambda: self.torch.matmul(a, b)
        return jobs


class HostClock:
    """The host's clock, for small shapes without a GPU."""

    device, driver = "no GPU (host clock)", 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        yield

    def seconds(self, job: Callable[[], Any]) -> float:
        began = time.perf_counter()
        job()
        return time.perf_counter() - began

    def start_memory(self) -> None:
        pass

    def peak_memory(self) -> int:
        return 0

    def free(self) -> None:
        gc.collect()

    def ceilings(self, size: int) -> dict[str, Callable[[], Any]]:
        import numpy as np

        a = np.ones((size, size), np.float32)
        return {"copy": lambda: a.copy(), "bf16 product": lambda: a @ a}
