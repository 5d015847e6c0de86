"""What the backends of a GPU share: CuPy's arrays, made from the host's and from other libraries'.

An array of another library that is in the device's memory (PyTorch, JAX) is used where it is,
through __cuda_array_interface__ or DLPack. Arithmetic on arrays of the host is an error that says
so: a copy that nobody asked for would cost more than the operation.

bfloat16 is on a GPU an array of uint16, its bits: CuPy runs nothing on the structured dtype that
stands for it in host memory (`pylora.numbers.precision.BF16`), not even a copy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.errors import BackendError, DtypeError, RangeError
from pylora.numbers.precision import BF16
from pylora.types import Array

BITS = np.dtype(np.uint16)  # of bfloat16, on the device
_DLPACK_CPU = 1  # kDLCPU


def open_cupy() -> Any:
    """The module cupy, where there is a GPU for it. BackendError says what is missing."""
    import cupy

    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # whatever the driver says
        raise BackendError(
            f"CuPy finds no GPU ({error}); `pylora doctor` says what is missing"
        ) from error
    if devices < 1:
        raise BackendError("CuPy finds no GPU; `pylora doctor` says what is missing")
    return cupy


class DeviceArrays:
    """The part of a backend that is about where arrays are; `xp` is cupy."""

    name: str
    xp: Any
    bitwise = False  # cuBLAS chooses its order of summation by the number of rows
    head_rows = 2048  # of a vocabulary of 128256: 1 GiB of logits

    # ---- to and from the device ---------------------------------------------------------------

    def on_device(self, a: Any) -> Array:
        """`a` as CuPy's array: itself, the same memory, or a copy of the host's."""
        xp = self.xp
        if isinstance(a, xp.ndarray):
            return a
        if isinstance(a, np.ndarray) or not hasattr(a, "__dlpack_device__"):
            exported = hasattr(a, "__cuda_array_interface__")
            return xp.asarray(a) if exported else self._from_host(np.asarray(a))
        bits = str(a.dtype) in ("torch.bfloat16", "bfloat16")
        if bits:  # neither NumPy nor CuPy takes it as it is
            a = a.view(_bits_type(a))
        if int(a.__dlpack_device__()[0]) == _DLPACK_CPU:
            own = self._from_host(np.from_dlpack(a))
        else:  # unlike __cuda_array_interface__, DLPack has PyTorch's stream waited for
            own = xp.from_dlpack(a)
        return own.view(BITS) if bits or own.dtype == np.int16 else own

    def _from_host(self, host: np.ndarray) -> Array:
        return self.xp.asarray(host.view(BITS) if host.dtype == BF16 else host)

    def index(self, a: Any) -> Array:
        """int64 [n] on the device."""
        if isinstance(a, self.xp.ndarray):
            return a
        host = np.ascontiguousarray(a)
        if host.dtype.kind not in "iu":
            raise DtypeError(f"ids, labels, positions and rows are integers, got {host.dtype}")
        return self.xp.asarray(host.astype(np.int64, copy=False))

    def checked_index(self, what: str, a: Any, n: int) -> Array:
        """The same; RangeError for one outside of 0 .. n - 1, looked at where it is."""
        some = a if isinstance(a, self.xp.ndarray) else np.asarray(a)
        if some.size and bool(((some < 0) | (some >= n)).any()):
            raise RangeError(f"a {what} is outside of 0 .. {n - 1}")
        return self.index(a)

    def place(self, a: Any) -> Array:
        return self.on_device(a)

    def assign(self, a: Array, values: np.ndarray) -> None:
        a.set(np.ascontiguousarray(values))

    def to_numpy(self, a: Any) -> np.ndarray:
        if isinstance(a, np.ndarray):
            return a
        host: np.ndarray = self.xp.asnumpy(a)
        return host.view(BF16) if host.dtype == BITS else host

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        return self.xp.empty(shape, self.dtype_of(dtype))

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
        return self.xp.zeros(shape, self.dtype_of(dtype))

    @staticmethod
    def dtype_of(dtype: Any) -> Any:
        """The dtype of the device's arrays for one that the layers name."""
        return BITS if dtype == BF16 else np.dtype(dtype)

    def check_room(self, nbytes: int) -> None:
        """BackendError where the weights cannot fit beside what is on the device already."""
        self.trim()
        free, total = self.xp.cuda.runtime.memGetInfo()
        if nbytes > free:
            raise BackendError(
                f"the model's weights need {nbytes:,} bytes on the GPU, and {free:,} of its "
                f"{total:,} are free; choose a narrower precision (bf16), free memory there, or "
                "use --backend c"
            )

    def trim(self) -> None:
        """Gives the memory of dead arrays back to the device."""
        self.xp.get_default_memory_pool().free_all_blocks()
        self.xp.get_default_pinned_memory_pool().free_all_blocks()  # what uploads were staged in


def _bits_type(a: Any) -> Any:
    """The 16-bit integers of the library that an array is of."""
    if type(a).__module__.split(".")[0] == "torch":
        import torch

        return torch.int16
    return np.uint16
