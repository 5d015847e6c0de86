"""CuPy arrays and pylora's plain data as the CUDA library takes them: checked, pointed at, kept.

Every matrix is float32, bfloat16 (uint16 bits) or float16. Pointers do not keep an array alive,
but CuPy's memory pool hands memory on in the order of the stream: an array may die once the work
that uses it is queued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.backends.device import BITS
from pylora.errors import DtypeError, ShapeError
from pylora.types import Array, Attn, Drop, LoRA, Seqs

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
CODES = {"fp32": 0, "bf16": 1, "fp16": 2}
DTYPES = {"fp32": F32, "bf16": BITS, "fp16": F16}
ALIGN = 256  # bytes: what CuPy and cudaMalloc align to


class Packed:
    """A frozen weight [d, k] as the library reads it. It is never written to."""

    def __init__(self, shape: tuple[int, int], precision: str, data: Array, struct: Any) -> None:
        self.shape, self.precision, self.data, self.struct = shape, precision, data, struct
        self.dtype, self.nbytes = F32, int(data.nbytes)


@dataclass(frozen=True, eq=False)
class PlacedSeqs(Seqs):
    """Sequences that are checked and on the device, too."""

    struct: Any  # pylora_cuda_seqs
    ints: Array  # what it points to


class Marshal:
    """For one library and CuPy."""

    def __init__(self, xp: Any, ffi: Any) -> None:
        self.xp, self.ffi = xp, ffi

    # ---- arrays -------------------------------------------------------------------------------

    def read(self, name: str, a: Any, *shape: int | None, narrow: bool = True) -> Array:
        """`a`, checked, as an array that the library can read: a copy where rows have gaps."""
        if not isinstance(a, self.xp.ndarray):
            if isinstance(a, np.ndarray) or not hasattr(a, "__cuda_array_interface__"):
                raise DtypeError(
                    f"{name} is a {type(a).__name__}, in host memory; the cuda backend computes "
                    "with arrays of the GPU (ops.asarray copies one there)"
                )
            a = self.xp.asarray(a)
        if a.dtype != F32 and not (narrow and a.dtype in (BITS, F16)):
            raise DtypeError(
                f"{name}: the cuda backend computes in float32, bfloat16 and float16, got "
                f"{a.dtype}; convert it, or use the numpy backend for float64"
            )
        want(name, a, shape)
        if a.size and (a.strides[-1] != a.itemsize or a.strides[0] % a.itemsize):
            return self.xp.ascontiguousarray(a)
        return a

    def vector(self, name: str, a: Any, n: int | None) -> Array:
        """A contiguous float32 [n]."""
        return self.xp.ascontiguousarray(self.read(name, a, n, narrow=False))

    def at(self, a: Array | None, ctype: str = "float *") -> Any:
        return self.ffi.NULL if a is None else self.ffi.cast(ctype, a.data.ptr)

    def mat(self, a: Array | None) -> Any:
        """A pylora_mat over a checked array; a vector is one column."""
        ffi = self.ffi
        if a is None:
            return ffi.NULL
        rows, cols = a.shape if a.ndim == 2 else (a.shape[0], 1)
        ld = a.strides[0] // a.itemsize if rows > 1 else cols
        out = ffi.new("pylora_mat *")
        out.rows, out.cols, out.ld = rows, cols, ld
        if a.dtype == F32:
            out.p = ffi.cast("float *", a.data.ptr)
        elif a.dtype == BITS:
            out.b = ffi.cast("uint16_t *", a.data.ptr)
        else:
            out.h = ffi.cast("uint16_t *", a.data.ptr)
        return out

    # ---- plain data ---------------------------------------------------------------------------

    def drop(self, drop: Drop | None) -> Any:
        if drop is None or drop.p == 0:
            return self.ffi.NULL
        if not 0 <= drop.p < 1:
            raise ShapeError(f"the dropout probability must be in [0, 1), got {drop.p}")
        return self.ffi.new("pylora_drop *", (drop.p, drop.seed, drop.stream, drop.row0))

    def lora(self, lora: LoRA | None, drop: Drop | None, d: int, k: int) -> tuple[Any, Any]:
        """(pylora_lora, what must stay alive)."""
        if lora is None:
            return self.ffi.NULL, None
        A = self.read("A", lora.A, None, k, narrow=False)
        B = self.read("B", lora.B, d, A.shape[0], narrow=False)
        out, c = self.ffi.new("pylora_lora *"), self.drop(drop)
        out.r, out.s, out.drop = A.shape[0], lora.scale, c
        out.A, out.lda = self.at(A), A.strides[0] // 4 if A.size else k
        out.B, out.ldb = self.at(B), B.strides[0] // 4 if B.size else A.shape[0]
        return out, (A, B, c)

    def attn(self, a: Attn) -> Any:
        return self.ffi.new(
            "pylora_attn *", (a.heads, a.kv_heads, a.head_dim, a.window, a.scale, a.softcap)
        )

    def seqs(self, n: int, ints: Array, max_q: int, max_k: int) -> Any:
        """pylora_cuda_seqs over device memory: q_start [n+1], k_start [n], k_len [n] in a row."""
        first, out = ints.data.ptr, self.ffi.new("pylora_cuda_seqs *")
        out.n, out.max_q, out.max_k = n, max_q, max_k
        out.q_start = self.ffi.cast("int64_t *", first)
        out.k_start = self.ffi.cast("int64_t *", first + 8 * (n + 1))
        out.k_len = self.ffi.cast("int64_t *", first + 8 * (2 * n + 1))
        return out


def want(name: str, a: Array, shape: tuple[int | None, ...]) -> None:
    if a.ndim != len(shape) or any(w is not None and w != g for w, g in zip(shape, a.shape)):
        expected = ", ".join("any" if w is None else str(w) for w in shape)
        raise ShapeError(f"{name} must have the shape [{expected}], got {list(a.shape)}")


def longest(seqs: Seqs) -> tuple[int, int]:
    """The most queries and keys of a sequence."""
    return int(np.diff(seqs.q_start).max(initial=0)), int(seqs.k_len.max(initial=0))


def aligned(nbytes: int) -> int:
    """What an array takes in memory that several share, one behind the other."""
    return -(-int(nbytes) // ALIGN) * ALIGN


def check_seqs(seqs: Seqs, q_rows: int, k_rows: int) -> None:
    """ShapeError unless every query and key is a row that exists: a kernel would read beyond."""
    q, k, n = (np.asarray(a) for a in (seqs.q_start, seqs.k_start, seqs.k_len))
    count = np.diff(q)
    if (
        q.size != k.size + 1
        or k.size != n.size
        or q[0] != 0
        or (count < 0).any()
        or q[-1] > q_rows
        or (n < count).any()
        or (k < 0).any()
        or (k + n > k_rows).any()
    ):
        raise ShapeError(
            f"the sequences do not fit {q_rows} rows of queries and {k_rows} rows of keys"
        )


def packed(W: Any) -> Packed:
    if not isinstance(W, Packed):
        raise DtypeError(f"W must be a weight packed by this backend, got {type(W).__name__}")
    return W
