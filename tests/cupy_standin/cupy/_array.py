"""The stand-in's array: NumPy computes, and whatever CuPy refuses is refused.

What counts is what real CuPy (14) does where NumPy would be kinder: no conversion to NumPy behind
one's back, no mixing with numpy.ndarray in arithmetic or assignment, indices out of range wrap
around, flags have no `writeable`, a reduction gives an array of no dimensions, and structured
dtypes cannot be computed with, not even copied. While a stream captures a graph, everything that
NumPy computes is an error: a replay would not repeat it.
"""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

capturing: list[Any] = []  # streams that capture
pools: list[Any] = []  # of using_allocator


def aligned(shape: Any, dtype: Any, order: str = "C") -> np.ndarray:
    """Uninitialised memory that begins at a multiple of 512, as CuPy's does."""
    dt = np.dtype(dtype)
    n = int(np.prod(shape, dtype=np.int64)) * dt.itemsize
    if order == "F":
        return aligned(tuple(shape)[::-1], dt).T
    raw = np.empty(n + 512, np.uint8)
    offset = -raw.__array_interface__["data"][0] % 512
    return raw[offset : offset + n].view(dt).reshape(shape)


class Flags:
    def __init__(self, a: np.ndarray) -> None:
        self.c_contiguous, self.f_contiguous = a.flags.c_contiguous, a.flags.f_contiguous
        self.owndata = a.flags.owndata


class MemoryPointer:
    def __init__(self, a: np.ndarray) -> None:
        # An array of no elements has no memory.
        self.ptr = a.__array_interface__["data"][0] if a.size else 0
        self.device_id = 0


def kernel(*arrays: np.ndarray) -> None:
    """Stands where CuPy would launch a kernel."""
    if capturing:
        raise RuntimeError("a stream captures, and NumPy cannot be captured")
    for a in arrays:
        if a.dtype.names is not None:
            raise TypeError("a kernel launch with a structured dtype fails (CuPy 14)")


def plain(x: Any) -> Any:
    """An operand as NumPy takes it; TypeError for one that CuPy refuses."""
    if isinstance(x, ndarray):
        return x._a
    if isinstance(x, np.ndarray) or not isinstance(x, (numbers.Number, np.generic, bool)):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def wrap(a: Any) -> ndarray:
    return ndarray._of(np.asarray(a))


def call(f: Any, *args: Any, **kw: Any) -> ndarray:
    operands = [plain(a) for a in args]
    kernel(*(a for a in operands if isinstance(a, np.ndarray)))
    with np.errstate(all="ignore"):  # a GPU has no floating-point warnings
        return wrap(f(*operands, **kw))


class ndarray:
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Any, dtype: Any = float, memptr: Any = None) -> None:
        self._a = aligned(shape, dtype)
        self._a.reshape(-1).view(np.uint8)[...] = 0xA5  # never zeros by luck
        for pool in pools[-1:]:
            pool.kept.append(self._a)

    @classmethod
    def _of(cls, a: np.ndarray) -> ndarray:
        out = cls.__new__(cls)
        out._a = a
        return out

    # ---- what it is ---------------------------------------------------------------------------

    shape = property(lambda s: s._a.shape)
    dtype = property(lambda s: s._a.dtype)
    ndim = property(lambda s: s._a.ndim)
    size = property(lambda s: s._a.size)
    nbytes = property(lambda s: s._a.nbytes)
    itemsize = property(lambda s: s._a.itemsize)
    strides = property(lambda s: s._a.strides)
    flags = property(lambda s: Flags(s._a))
    data = property(lambda s: MemoryPointer(s._a))
    T = property(lambda s: wrap(s._a.T))
    base = property(lambda s: None if s._a.base is None else wrap(s._a.base))

    @property
    def real(self) -> ndarray:
        return self if self.dtype.kind != "c" else wrap(self._a.real)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        i = self._a.__array_interface__
        return {
            "shape": i["shape"], "typestr": i["typestr"], "descr": i["descr"], "version": 3,
            "strides": i["strides"], "data": (i["data"][0], False), "stream": 1,
        }  # fmt: skip

    def __array__(self, *args: Any, **kw: Any) -> Any:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kw: Any) -> Any:
        if method == "at":
            import cupy

            return getattr(cupy, ufunc.__name__).at(*inputs)
        if method != "__call__" or kw:
            return NotImplemented
        return call(ufunc, *inputs)

    def __len__(self) -> int:
        return len(self._a)

    def __repr__(self) -> str:
        return f"cupy_standin({self._a!r})"

    # ---- to the host --------------------------------------------------------------------------

    def get(self, *args: Any, **kw: Any) -> np.ndarray:
        if capturing:
            raise RuntimeError("a copy to the host while a stream captures")
        return np.array(self._a, order="C")

    def _scalar(self) -> Any:
        if self.size != 1:
            raise ValueError("only an array of one element is a scalar")
        return self.get().reshape(())[()]

    def item(self) -> Any:
        return self._scalar().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self) -> bytes:
        return self.get().tobytes()

    def __bool__(self) -> bool:
        return bool(self._scalar())

    def __float__(self) -> float:
        return float(self._scalar())

    def __int__(self) -> int:
        return int(self._scalar())

    def __index__(self) -> int:
        return self._scalar().__index__()

    # ---- the same memory, seen otherwise ------------------------------------------------------

    def reshape(self, *shape: Any, order: str = "C") -> ndarray:
        try:
            view = self._a.view()
            view.shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return wrap(view)
        except AttributeError:
            kernel(self._a)
            return wrap(self._a.reshape(*shape))

    def ravel(self) -> ndarray:
        return self.reshape(-1)

    def transpose(self, *axes: Any) -> ndarray:
        return wrap(self._a.transpose(*axes))

    def view(self, dtype: Any = None) -> ndarray:
        return wrap(self._a.view() if dtype is None else self._a.view(dtype))

    def squeeze(self, axis: Any = None) -> ndarray:
        return wrap(self._a.squeeze(axis))

    # ---- indexing -----------------------------------------------------------------------------

    def _index(self, key: Any) -> tuple[Any, bool]:
        """The key for NumPy, and whether an array is in it (a kernel, then); indices wrap."""
        parts, advanced = [], False
        whole = key if isinstance(key, tuple) else (key,)
        taken = sum(self._takes(k) for k in whole)
        axis = 0
        for k in whole:
            if isinstance(k, (list, np.ndarray)):  # CuPy copies these to the device
                if capturing:
                    raise RuntimeError("an index from the host while a stream captures")
                k = wrap(np.asarray(k))
                if k.size == 0 and k.dtype.kind == "f":
                    k = wrap(k._a.astype(np.int32))
            if isinstance(k, ndarray):
                advanced = True
                if k.dtype.kind in "iu":
                    parts.append(k._a % max(self.shape[axis], 1))
                    axis += 1
                elif k.dtype.kind == "b":
                    parts.append(k._a)
                    axis += k.ndim
                else:
                    raise IndexError("arrays used as indices must be of integer or boolean type")
                continue
            parts.append(k)
            if k is Ellipsis:
                axis += self.ndim - taken
            elif k is not None:
                axis += 1
        return tuple(parts), advanced

    @staticmethod
    def _takes(k: Any) -> int:
        if k is None or k is Ellipsis:
            return 0
        return k.ndim if getattr(k, "dtype", None) == np.bool_ else 1

    def __getitem__(self, key: Any) -> ndarray:
        if isinstance(key, str):
            return wrap(self._a[key])
        key, advanced = self._index(key)
        if advanced:
            kernel(self._a)
            return wrap(self._a[key])
        return wrap(self._a[(*key, Ellipsis)] if Ellipsis not in key else self._a[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        value = plain(value)
        key, _ = self._index(key)
        kernel(self._a)
        self._a[key] = value

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def take(self, indices: Any, axis: Any = None) -> ndarray:
        return wrap(self._a)[(slice(None),) * (axis or 0) + (indices,)]

    # ---- arithmetic ---------------------------------------------------------------------------

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> ndarray:
        if not copy and self.dtype == dtype and (order == "K" or self._a.flags.c_contiguous):
            return self
        return call(lambda a: a.astype(dtype, order=order), self)

    def copy(self) -> ndarray:
        kernel(self._a)
        return wrap(self._a.copy(order="C"))

    def fill(self, value: Any) -> None:
        kernel(self._a)
        self._a.fill(plain(value))

    def set(self, a: np.ndarray, stream: Any = None) -> None:
        """A copy from the host."""
        if not isinstance(a, np.ndarray):
            raise TypeError(f"Only numpy.ndarray can be set to cupy.ndarray, not {type(a)}")
        if a.dtype != self.dtype:
            raise TypeError(f"{a.dtype} array cannot be set to {self.dtype} array")
        if a.shape != self.shape:
            raise ValueError("Shape mismatch")
        if not (self.flags.c_contiguous or self.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        if capturing:
            raise RuntimeError("a copy from the host while a stream captures")
        self._a[...] = a

    def sort(self, axis: int = -1) -> None:
        kernel(self._a)
        self._a.sort(axis)


def _reduction(name: str, *allowed: str) -> Any:
    def method(self: ndarray, axis: Any = None, **kw: Any) -> ndarray:
        odd = set(kw) - {*allowed, "keepdims"}
        if odd:
            raise TypeError(f"{name}() got an unexpected keyword argument {odd.pop()!r}")
        return call(lambda a: getattr(a, name)(axis=axis, **kw), self)

    return method


for _name in ("sum", "mean", "prod"):
    setattr(ndarray, _name, _reduction(_name, "dtype"))
for _name in ("max", "min", "any", "all", "argmax", "argmin"):
    setattr(ndarray, _name, _reduction(_name))

_BINARY = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "truediv": np.true_divide,
    "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "lshift": np.left_shift, "rshift": np.right_shift,
    "matmul": np.matmul,
}  # fmt: skip
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _operators(name: str, f: Any) -> None:
    def forward(self: ndarray, other: Any) -> Any:
        return call(f, self, other)

    def backward(self: ndarray, other: Any) -> Any:
        return call(f, other, self)

    def in_place(self: ndarray, other: Any) -> Any:
        other = plain(other)
        kernel(self._a)
        with np.errstate(all="ignore"):
            f(self._a, other, out=self._a, casting="same_kind")
        return self

    setattr(ndarray, f"__{name}__", forward)
    if name in _BINARY:
        setattr(ndarray, f"__r{name}__", backward)
        setattr(ndarray, f"__i{name}__", in_place)


for _name, _f in (_BINARY | _COMPARE).items():
    _operators(_name, _f)
ndarray.__neg__ = lambda s: call(np.negative, s)  # type: ignore[attr-defined]
ndarray.__abs__ = lambda s: call(np.abs, s)  # type: ignore[attr-defined]
ndarray.__invert__ = lambda s: call(np.invert, s)  # type: ignore[attr-defined]
