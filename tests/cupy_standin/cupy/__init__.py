"""A stand-in for CuPy, for tests on machines without a GPU: as strict as CuPy, in host memory.

It has what pylora uses and nothing else, so that a name which CuPy lacks is an AttributeError here,
too. Pointers are the host's: the CUDA library that the tests compile for the host takes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cupy import cuda
from cupy._array import aligned, call, capturing, kernel, ndarray, plain, wrap
from cupy.cuda import RawModule

__version__ = "14.0.0"
IS_STANDIN = True

float16, float32, float64, complex128 = np.float16, np.float32, np.float64, np.complex128
int8, int32, int64, uint8, uint16, uint32, uint64, bool_ = (
    np.int8, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.bool_,
)  # fmt: skip
newaxis, inf, nan, pi = None, np.inf, np.nan, np.pi


def _host(a: Any) -> Any:
    """From the host: copied in, which a capture cannot be. Columns stay columns."""
    if capturing:
        raise RuntimeError("a copy from the host while a stream captures")
    a = np.asarray(a)
    columns = a.flags.f_contiguous and not a.flags.c_contiguous
    out = aligned(a.shape, a.dtype, "F" if columns else "C")
    out[...] = a
    return out


def asarray(a: Any, dtype: Any = None, order: str | None = None) -> ndarray:
    if isinstance(a, ndarray):
        out = a if dtype is None or a.dtype == dtype else a.astype(dtype)
        return ascontiguousarray(out) if order == "C" else out
    interface = getattr(a, "__cuda_array_interface__", None)
    if interface is not None:
        return wrap(np.asarray(_Exported(interface, a)))
    out = _host(a)
    return wrap(out if dtype is None else out.astype(dtype))


class _Exported:
    def __init__(self, interface: dict[str, Any], owner: Any) -> None:
        self.__array_interface__ = {**interface, "version": 3}
        self.owner = owner


def array(a: Any, dtype: Any = None, copy: bool = True) -> ndarray:
    out = asarray(a, dtype)
    return out.copy() if copy and out is a else out


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    return a if a.flags.c_contiguous else a.copy()


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, ndarray) else np.asarray(a)


def from_dlpack(a: Any) -> ndarray:
    if isinstance(a, ndarray):
        return a
    if a.__dlpack_device__()[0] == 1:
        raise TypeError("CPU arrays cannot be directly imported to CuPy.")
    return wrap(np.from_dlpack(a))


def get_array_module(*args: Any) -> Any:
    import cupy

    return cupy if any(isinstance(a, ndarray) for a in args) else np


def empty(shape: Any, dtype: Any = float) -> ndarray:
    return ndarray(shape, dtype)


def zeros(shape: Any, dtype: Any = float) -> ndarray:
    out = ndarray(shape, dtype)
    cuda.clear(out._a)
    return out


def ones(shape: Any, dtype: Any = float) -> ndarray:
    return full(shape, 1, dtype)


def full(shape: Any, value: Any, dtype: Any = None) -> ndarray:
    kernel()
    return wrap(np.full(shape, plain(value), dtype))


def empty_like(a: ndarray, dtype: Any = None) -> ndarray:
    plain(a)
    return ndarray(a.shape, a.dtype if dtype is None else dtype)


def zeros_like(a: ndarray, dtype: Any = None) -> ndarray:
    plain(a)
    return zeros(a.shape, a.dtype if dtype is None else dtype)


def ones_like(a: ndarray, dtype: Any = None) -> ndarray:
    plain(a)
    return ones(a.shape, a.dtype if dtype is None else dtype)


def arange(*args: Any, dtype: Any = None) -> ndarray:
    kernel()
    return wrap(np.arange(*args, dtype=dtype))


def _several(f: Any) -> Any:
    def of(arrays: Any, axis: int = 0) -> ndarray:
        some = [a if isinstance(a, ndarray) else plain(a) for a in arrays]
        return call(lambda *each: f(each, axis=axis), *some)

    return of


stack, concatenate = _several(np.stack), _several(np.concatenate)


class _Ufunc:
    def __init__(self, f: Any) -> None:
        self._f, self.__name__ = f, f.__name__

    def __call__(self, *args: Any, out: Any = None) -> ndarray:
        if out is None:
            return call(self._f, *args)
        operands = [plain(a) for a in args]
        kernel(out._a)
        self._f(*operands, out=out._a)
        return out

    def at(self, a: ndarray, index: Any, value: Any) -> None:
        """add.at and its like, by atomics: of floats in no certain order, so here backwards."""
        if self.__name__ not in ("add", "subtract", "maximum", "minimum"):
            raise NotImplementedError(f"cupy.{self.__name__}.at")
        value = plain(value)
        key, _ = a._index(index)
        kernel(a._a)
        if len(key) == 1 and isinstance(key[0], np.ndarray) and key[0].ndim == 1:
            value = np.broadcast_to(value, (key[0].size, *a.shape[1:]))[::-1]
            key = (key[0][::-1],)
        self._f.at(a._a, key, value)


for _name in (
    "exp", "log", "tanh", "sqrt", "abs", "maximum", "minimum", "isnan", "isfinite", "isinf", "add",
    "subtract", "multiply", "divide", "negative", "equal", "not_equal", "less", "greater",
    "greater_equal", "less_equal", "logical_and", "logical_or", "bitwise_and", "right_shift",
    "left_shift", "floor", "matmul", "cos", "sin", "true_divide", "invert",
):  # fmt: skip
    globals()[_name] = _Ufunc(getattr(np, _name))


def where(condition: Any, a: Any, b: Any) -> ndarray:
    return call(np.where, condition, a, b)


def einsum(subscripts: str, *arrays: ndarray) -> ndarray:
    return call(lambda *a: np.einsum(subscripts, *a), *arrays)


def diagonal(a: ndarray) -> ndarray:
    return call(np.diagonal, a)


def flatnonzero(a: ndarray) -> ndarray:
    return call(np.flatnonzero, a)


def cumsum(a: ndarray, axis: Any = None) -> ndarray:
    return call(lambda x: np.cumsum(x, axis), a)


def repeat(a: ndarray, n: int, axis: Any = None) -> ndarray:
    return call(lambda x: np.repeat(x, n, axis), a)


def searchsorted(a: ndarray, v: Any) -> ndarray:
    return call(np.searchsorted, a, v)


def argsort(a: ndarray, axis: int = -1) -> ndarray:
    return call(lambda x: np.argsort(x, axis, kind="stable"), a)


def take(a: ndarray, indices: Any, axis: Any = None) -> ndarray:
    return a.take(indices, axis)


def sum(a: ndarray, axis: Any = None) -> ndarray:
    return a.sum(axis=axis)  # type: ignore[attr-defined]


class random:
    class default_rng:
        def __init__(self, seed: int) -> None:
            self._rng = np.random.default_rng(seed)

        def standard_normal(self, size: Any, dtype: Any = float) -> ndarray:
            return asarray(self._rng.standard_normal(size, dtype))


def get_default_memory_pool() -> cuda.MemoryPool:
    return cuda._pool


def get_default_pinned_memory_pool() -> cuda.MemoryPool:
    return cuda._pool


def broadcast_to(a: ndarray, shape: Any) -> ndarray:
    return wrap(np.broadcast_to(plain(a), shape))


def may_share_memory(a: ndarray, b: ndarray) -> bool:
    return np.may_share_memory(plain(a), plain(b))


shares_memory = may_share_memory

__all__ = ["RawModule", "cuda", "ndarray"]
