"""NumPy arrays and pylora's plain data as the C core takes them: checked, pointed at, kept alive.

Pointers do not keep their array alive: the caller holds the checked array in a variable until the
call has returned. Nothing here computes.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NoReturn

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.errors import BackendError, DtypeError, RangeError, ShapeError
from pylora.numbers.precision import BF16
from pylora.ops.features import ACTIVATIONS
from pylora.types import Array, Attn, Drop, LoRA, Norm, Seqs

F32 = np.dtype(np.float32)
_FLOATS = BF16, F32
_MAT = ffi.typeof("pylora_mat *")
_LORA, _LORAS = ffi.typeof("pylora_lora *"), ffi.typeof("pylora_lora *[1]")
_FLOAT, _BITS, _VOID = ffi.typeof("float *"), ffi.typeof("uint16_t *"), ffi.typeof("void *")
_NULL, _from_buffer = ffi.NULL, ffi.from_buffer  # looked up once: each call takes several
_LAYOUTS, _NORMS = ("half", "interleaved"), ("rms", "layer")  # in the order of pylora.h
_DTYPES = {"f32": (0, np.float32), "bf16": (1, np.uint16), "f16": (2, np.float16)}


class Packed:
    """A frozen weight [d, k] in the order that the kernels read. It is never written to."""

    def __init__(
        self, shape: tuple[int, int], precision: str, data: np.ndarray, struct: Any
    ) -> None:
        self.shape, self.precision = shape, precision
        self.dtype = F32
        self.nbytes = data.nbytes
        self._data = data
        self.struct = struct
        self.latest: tuple[Any, ...] | None = None  # see adapter_of

    def __repr__(self) -> str:
        return (
            f"Packed([{self.shape[0]}, {self.shape[1]}], {self.precision}, {self.nbytes:,} bytes)"
        )


def check(status: int, op: str) -> None:
    if status:
        text = ffi.string(lib.pylora_status_text(status)).decode()
        raise (RangeError if status == lib.PYLORA_E_INDEX else BackendError)(f"{op}: {text}")


def read(name: str, a: Array, *shape: int | None) -> np.ndarray:
    """`a`, checked, as a float32 array the core can read in place: a copy only where it cannot."""
    if not isinstance(a, np.ndarray) or a.dtype != F32:
        _refuse(name, a)
    return _readable(name, a, shape)


def read_any(name: str, a: Array, *shape: int | None) -> np.ndarray:
    """The same of a float32 or BF16 array."""
    if not isinstance(a, np.ndarray) or a.dtype not in _FLOATS:
        _refuse(name, a)
    return _readable(name, a, shape)


def _refuse(name: str, a: Any) -> NoReturn:
    got = getattr(a, "dtype", type(a).__name__)
    raise DtypeError(
        f"{name}: the c backend computes in float32, got {'bfloat16' if got == BF16 else got}; "
        "convert it, or use the numpy backend for float64"
    )


def _readable(name: str, a: np.ndarray, shape: tuple[int | None, ...]) -> np.ndarray:
    want(name, a, shape)
    flags = a.flags
    if flags.c_contiguous and flags.aligned:
        return a
    size, strides = a.itemsize, a.strides
    if flags.aligned and strides and strides[-1] == size:
        if a.ndim == 1 or strides[0] % size == 0:
            return a
    return np.require(a, requirements=["C", "A"])


def want(name: str, a: Array, shape: tuple[int | None, ...]) -> None:
    got = a.shape
    if got == shape or (got[1:] == shape[1:] and shape[0] is None and got):
        return
    fits = len(got) == len(shape)
    for w, g in zip(shape, got):  # not any(...), whose generator costs more than the comparisons
        if w is not None and w != g:
            fits = False
    if not fits:
        expected = ", ".join("any" if w is None else str(w) for w in shape)
        raise ShapeError(f"{name} must have the shape [{expected}], got {list(got)}")


def ints(name: str, a: Any, n: int | None = None) -> np.ndarray:
    v = np.ascontiguousarray(a)
    if v.dtype.kind not in "iu":
        raise DtypeError(f"{name} must be integers, got {v.dtype}")
    want(name, v, (n,))
    return v.astype(np.int64, copy=False)


def at(a: np.ndarray | None, ctype: Any = _FLOAT) -> Any:
    """Pointer to the first element. It holds the array; a struct that it is put into does not."""
    if a is None:
        return ffi.NULL
    # A tenth of what __array_interface__ costs. Only a contiguous array is such a buffer; of any
    # other that `read` lets through the first row is one, and begins where the array begins.
    return ffi.from_buffer(ctype, a if a.flags.c_contiguous else a[:1])


def mat(a: np.ndarray | None) -> Any:
    """A pylora_mat over a checked array. The caller keeps the array alive."""
    return ffi.NULL if a is None else ffi.new(_MAT, fields(a))


def fields(a: np.ndarray) -> tuple[Any, ...]:
    """Those of a pylora_mat. An argument of a call may be `[fields(a)]`: cffi then makes the struct
    on the stack, in half the time of `mat`."""
    rows, cols = a.shape
    ld = cols
    if not a.flags.c_contiguous:
        a, ld = a[:1], a.strides[0] // a.itemsize
    if a.itemsize == 2:
        return _NULL, rows, cols, ld, _from_buffer(_BITS, a)
    return _from_buffer(_FLOAT, a), rows, cols, ld


def writable(name: str, a: Array, n: int) -> np.ndarray:
    if not isinstance(a, np.ndarray) or a.dtype != F32 or not a.flags.c_contiguous or a.size != n:
        raise ShapeError(
            f"{name} is updated in place: it must be a contiguous float32 array of {n}"
        )
    if not a.flags.writeable:
        raise ShapeError(f"{name} is updated in place, but the array is read-only")
    return a


class Scratch(threading.local):
    """One workspace per Python thread, grown when an operation needs more."""

    def __init__(self) -> None:
        self.room: tuple[Any, int] = ffi.NULL, 0  # (pointer, bytes)
        self.at_least(1)  # where there is none at all, the core sees a mistake of its caller

    def at_least(self, nbytes: int) -> tuple[Any, int]:
        if self.room[1] < nbytes:
            # from_buffer's pointer keeps the array alive, unlike one in a struct
            self.room = at(np.empty(nbytes, np.uint8), _VOID), nbytes
        return self.room


def shape_of(W: Packed | None) -> tuple[int, int]:
    if not isinstance(W, Packed):
        raise DtypeError(f"W must be a weight packed by this backend, got {type(W).__name__}")
    return W.shape


def want_inputs(W: Packed | None, k: int) -> tuple[int, int]:
    """The shape of a packed weight of k inputs."""
    shape = shape_of(W)
    if shape[1] != k:
        raise ShapeError(f"x must have the shape [any, {shape[1]}], got [any, {k}]")
    return shape


def owned(name: str, a: Array, m: int, k: int) -> np.ndarray:
    """An array that may be overwritten: itself if the core can write to it, else a copy."""
    checked = read(name, a, m, k)
    return checked if checked.flags.writeable else checked.copy()


def drop_struct(drop: Drop | None) -> Any:
    if drop is None or drop.p == 0:
        return ffi.NULL
    if not 0 <= drop.p < 1:
        raise ShapeError(f"the dropout probability must be in [0, 1), got {drop.p}")
    return ffi.new("pylora_drop *", (drop.p, drop.seed, drop.stream, drop.row0))


def lora_struct(lora: LoRA | None, drop: Drop | None, d: int, k: int) -> tuple[Any, Any, Any, Any]:
    """The pylora_lora of an adapter and everything that must stay alive beside it."""
    if lora is None:
        return ffi.NULL, None, None, None
    A = read("A", lora.A, None, k)
    B = read("B", lora.B, d, A.shape[0])
    cdrop = drop_struct(drop)
    low = (
        A.shape[0], at(A), A.strides[0] // 4, at(B), B.strides[0] // 4, lora.scale, cdrop, ffi.NULL,
    )  # fmt: skip
    return ffi.new(_LORA, low), A, B, cdrop


def adapter_of(W: Packed, lora: LoRA, drop: Drop | None) -> tuple[Any, Any]:
    """(pylora_lora *[1] of an adapter of W, what must stay alive).

    W remembers the latest one without dropout, for as long as that lives: checking A and B costs as
    much as multiplying a row by them. Its numbers may change, its arrays not: a LoRA is frozen, and
    NumPy resizes no array that has weak references."""
    latest = W.latest  # read once: another thread may put its own there
    plain = drop is None or drop.p == 0
    if plain and latest is not None and latest[0]() is lora:
        return latest[1], (latest, lora)
    low, A, B, cdrop = lora_struct(lora, drop, *W.shape)
    one = ffi.new(_LORAS, [low])
    if plain and A is lora.A and B is lora.B:  # no copies, whose numbers would stay
        W.latest = weakref.ref(lora), one, low, weakref.ref(A), weakref.ref(B)
    return one, (low, A, B, cdrop)


def adapter_or_struct(
    W: Packed | None, lora: LoRA | None, drop: Drop | None, d: int, k: int
) -> tuple[Any, ...]:
    """(pylora_lora *, what must stay alive), for backward, which may have no W."""
    if lora is None or W is None or W.shape != (d, k):
        return lora_struct(lora, drop, d, k)
    one, alive = adapter_of(W, lora, drop)
    return one[0], alive


def read_qkv(q: Array, k: Array, v: Array, attn: Attn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k = read_any("k", k, None, attn.kv_heads * attn.head_dim)
    q = read_any("q", q, None, attn.heads * attn.head_dim)
    return q, k, read_any("v", v, *k.shape)


def attention_structs(seqs: Seqs, attn: Attn) -> tuple[Any, Any, Any]:
    """(pylora_seqs, pylora_attn, what must stay alive)."""
    start = ints("seqs.k_start", seqs.k_start)
    n = start.size
    q, length = ints("seqs.q_start", seqs.q_start, n + 1), ints("seqs.k_len", seqs.k_len, n)
    i64 = "int64_t *"
    s = ffi.new("pylora_seqs *", (n, at(q, i64), at(start, i64), at(length, i64)))
    spec = (attn.heads, attn.kv_heads, attn.head_dim, attn.window, attn.scale, attn.softcap)
    return s, ffi.new("pylora_attn *", spec), (q, start, length)


def layout_of(layout: str) -> int:
    """The number of a rotary layout. BackendError for one that there is none of."""
    if layout not in _LAYOUTS:
        raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
    return _LAYOUTS.index(layout)


def activation_of(kind: str) -> int:
    """The number of an activation: its place in ACTIVATIONS, as in pylora.h."""
    if kind not in ACTIVATIONS:
        raise BackendError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(kind)


def norm_struct(norm: Norm, k: int, dtype: int, rstd: Any = _NULL) -> tuple[Any, Any]:
    """(pylora_norm of rows of k numbers, what must stay alive); the result is of `dtype`."""
    if norm.kind not in _NORMS:
        raise BackendError(f"norm {norm.kind!r} is none of {', '.join(_NORMS)}")
    w = np.ascontiguousarray(read("w", norm.w, k))
    b = None if norm.b is None else np.ascontiguousarray(read("b", norm.b, k))
    spec = (at(w), norm.eps, dtype, rstd, _NORMS.index(norm.kind), at(b))
    return ffi.new("pylora_norm *", spec), (w, b, rstd)


def stored(name: str, W: Array, dtype: str) -> tuple[int, np.ndarray]:
    """(dtype code, C-contiguous array) of a weight in its stored form."""
    if dtype not in _DTYPES:
        raise DtypeError(f"merge: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    code, kind = _DTYPES[dtype]
    if not isinstance(W, np.ndarray) or W.dtype != kind:
        raise DtypeError(f"{name}: stored as {dtype} must be an array of {np.dtype(kind)}")
    want(name, W, (None, None))
    return code, np.ascontiguousarray(W)
