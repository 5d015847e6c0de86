"""The C backend: the operations of `pylora.reference.Reference` on the compiled core, in float32
and bfloat16.

Inputs may have any strides; a row whose elements do not lie side by side is copied first. The
interpreter lock is released while the core works.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c_llama import CLlama
from pylora.backends.marshal import (
    F32,
    Packed,
    Scratch,
    adapter_of,
    adapter_or_struct,
    at,
    attention_structs,
    check,
    drop_struct,
    fields,
    ints,
    lora_struct,
    mat,
    owned,
    read,
    read_any,
    read_qkv,
    shape_of,
    stored,
    want,
    want_inputs,
    writable,
)
from pylora.backends.pool import Pool
from pylora.backends.slabs import Slabs
from pylora.errors import BackendError, DtypeError, ShapeError, UnsupportedError
from pylora.numbers.precision import BF16, PRECISIONS, Stored, as_dtype, check_precision, from_bf16
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.plain import Plain, want_writable
from pylora.types import (
    AdamW,
    Array,
    Attn,
    Drop,
    LoRA,
    Norm,
    Projection,
    ProjectionGrad,
    Residue,
    Rotation,
    Seqs,
)

_LAYOUTS = {"half": 0, "interleaved": 1}
_STORES = {  # what a precision makes of a float source
    "fp32": lib.PYLORA_F32,
    "fp32x3": lib.PYLORA_F32X3,
    "bf16": lib.PYLORA_BF16,
    "int8": lib.PYLORA_Q8_0,
    "int4": lib.PYLORA_Q4_1,
}
_BLOCKS = {"q8_0": lib.PYLORA_Q8_0, "q4_0": lib.PYLORA_Q4_0, "q4_1": lib.PYLORA_Q4_1}
_LINEARS = ffi.typeof("pylora_linear[]")
_INT64 = ffi.typeof("int64_t *")
_ATTEMPTS = 8  # at a workspace, should another thread change the number of threads meanwhile


def _kind(dtype: Any) -> int:
    return int(lib.PYLORA_BF16 if dtype is not None and dtype == BF16 else lib.PYLORA_F32)


def _mixed(projections: Sequence[Projection]) -> bool:
    """Whether their weights have several formats, as those of a file may: one call takes one."""
    return len({shape_of(p.W) and p.W.struct.dtype for p in projections}) > 1


class CBackend(Plain):
    """The compiled core. `Reference`'s docstrings are the specification of every operation."""

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

    # ---- run time -----------------------------------------------------------------------------

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

    # ---- arrays -------------------------------------------------------------------------------

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

    # ---- precision ----------------------------------------------------------------------------

    def computes(self, precision: str) -> str:
        """The precision that a model of this one has here: "fp32x3" needs bfloat16 tiles (AMX),
        and is strict float32 without them."""
        if check_precision(precision) == "fp16":
            raise UnsupportedError(
                "the c backend does not compute in fp16, which is for GPUs (--backend cuda); "
                f"choose one of {', '.join(p for p in PRECISIONS if p != 'fp16')}"
            )
        if precision == "fp32x3" and ffi.string(lib.pylora_isa()) != b"amx":
            return "fp32"
        return precision

    def activation_dtype(self, precision: str) -> Any:
        """The dtype of arrays that only feed products; None: the computation's own."""
        return BF16 if check_precision(precision) == "bf16" else None

    def pack(self, W: Array | Stored, precision: str = "fp32") -> Packed:
        """W [d, k] in panels of 32 outputs, as `precision` stores it; blocks of a quantized file
        are taken as they are. The copy is the only one the model needs."""
        precision = self.computes(precision)
        if isinstance(W, Stored):
            if W.kind in _BLOCKS and precision in ("int8", "int4"):
                return self._pack_blocks(W, precision)
            W = self._read_stored(W, precision)
        a = (read_any if precision == "bf16" else read)("W", W, None, None)
        code, (d, k) = _STORES[precision], a.shape
        data, struct = self._room(code, d, k, precision)
        check(lib.pylora_pack(code, mat(a), at(data, "void *"), struct), "pack")
        return Packed((d, k), precision, data, struct)

    def _pack_blocks(self, W: Stored, precision: str) -> Packed:
        code, (d, k), rows = _BLOCKS[W.kind], W.shape, np.ascontiguousarray(W.rows)
        data, struct = self._room(code, d, k, precision)
        start, to = at(rows, "void *"), at(data, "void *")
        check(lib.pylora_pack_blocks(code, d, k, start, rows.shape[1], to, struct), "pack")
        return Packed((d, k), precision, data, struct)

    def _room(self, code: int, d: int, k: int, precision: str) -> tuple[np.ndarray, Any]:
        """The buffer of a packed weight, 64-byte aligned, and its struct to be filled in."""
        nbytes = lib.pylora_pack_bytes(code, d, k)
        if nbytes == 0 and d and k:
            if precision in ("int8", "int4") and k % 32:
                raise ShapeError(
                    f"{precision} stores weights in groups of 32 inputs, and a weight here is "
                    f"[{d}, {k}]; use fp32 or bf16 for this model"
                )
            raise BackendError(f"this build cannot store a weight [{d}, {k}] in {precision}")
        return self._slabs.take(nbytes), ffi.new("pylora_packed *")

    @staticmethod
    def _read_stored(W: Stored, precision: str) -> np.ndarray:
        """The numbers of a stored weight whose blocks this precision does not keep."""
        if W.kind == "bf16":
            bits = np.ascontiguousarray(W.rows).view(BF16)
            return bits if precision == "bf16" else from_bf16(bits)
        from pylora.numbers.quantize import dequantize

        values: np.ndarray = dequantize(W)
        return values

    def unpack(self, P: Packed) -> np.ndarray:
        W = np.empty(P.shape, np.float32)
        check(lib.pylora_unpack(P.struct, mat(W)), "unpack")
        return W

    # ---- LoRA linear --------------------------------------------------------------------------

    def lora_forward(
        self,
        x: Array,
        W: Packed,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        # `_together` for one, in half the time: the structs are made on the stack (see `fields`).
        d, k = shape_of(W)
        x = read_any("x", x, None, k)
        m, rank, empty = x.shape[0], 0, self._pool.empty
        y = empty((m, d), F32 if dtype is None else dtype)
        h = alive = None
        low = hs = bs = rs = ffi.NULL
        if lora is not None:
            one, alive = adapter_of(W, lora, drop)
            low, rank = one[0], lora.A.shape[0]
            h = empty((m, rank), F32)
            hs = [fields(h)]
        if bias is not None:
            bs = at(np.ascontiguousarray(read("bias", bias, d)))  # such a pointer holds its array
        if residual is not None:
            residual = read("residual", residual, m, d)
            rs = [fields(residual)]
        self._in_scratch(
            "linear_forward",
            lib.pylora_lora_workspace, (m, d, k, rank),
            lib.pylora_lora_forward, ([fields(x)], W.struct, bs, low, rs, [fields(y)], hs),
        )  # fmt: skip
        return y, h

    def linear_forward(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        n = len(projections)
        if n == 1:
            p = projections[0]
            return [self.lora_forward(x, p.W, p.bias, p.lora, p.drop, p.residual, p.dtype)]
        if _mixed(projections):
            return [self.linear_forward(x, [p])[0] for p in projections]
        return self._together("linear_forward", x, projections, [p.dtype for p in projections])[0]

    def _together(
        self,
        op: str,
        x: Array,
        projections: Sequence[Projection],
        dtypes: Sequence[Any],
        norm: Norm | None = None,
        dtype: Any = None,
        finish: Any = ffi.NULL,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray | None]:
        """Projections of one x, whose y are of `dtypes`; and the rstd of the norm, of `dtype`."""
        n = len(projections)
        x = read_any("x", x, None, shape_of(projections[0].W)[1] if n else None)
        (m, k), empty = x.shape, self._pool.empty
        rows, results, outputs, ranks = [], [], 0, 0
        keep: list[Any] = []
        first, rstd = ffi.NULL, None
        if norm is not None:
            w, rstd = np.ascontiguousarray(read("w", norm.w, k)), np.empty(m, np.float32)
            first = ffi.new("pylora_norm *", (at(w), norm.eps, _kind(dtype), at(rstd)))
            keep.append(w)
        for p, kind in zip(projections, dtypes, strict=True):
            d, _ = want_inputs(p.W, k)
            y, h = empty((m, d), F32 if kind is None else kind), None
            lora, alive = ffi.NULL, None
            if p.lora is not None:
                lora, alive = adapter_of(p.W, p.lora, p.drop)
                h = empty((m, rank := p.lora.rank), F32)
                ranks += rank
            bias = None if p.bias is None else np.ascontiguousarray(read("bias", p.bias, d))
            residual = None if p.residual is None else read("residual", p.residual, m, d)
            rows.append((p.W.struct, at(bias), lora, mat(residual), mat(y), mat(h)))
            keep += alive, bias, residual
            outputs += d
            results.append((y, h))
        self._in_scratch(
            op,
            lib.pylora_linear_workspace, (m, n, outputs, k, ranks),
            lib.pylora_fused_forward,
            (mat(x), first, n, ffi.new(_LINEARS, rows), finish, 1, ffi.NULL),
        )  # fmt: skip
        return results, rstd

    def qkv_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        rotation: Rotation | None = None,
        dtype: Any = None,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray | None]:
        q, k, v = projections
        rounded = rotation is not None and (q.dtype is not None or k.dtype is not None)
        if _mixed(projections) or rounded:
            return super().qkv_forward(x, projections, norm, rotation, dtype)
        op, dtypes = "qkv_forward", [q.dtype, k.dtype, v.dtype]
        x = read_any("x", x, None, shape_of(q.W)[1])
        if rotation is None:
            return self._together(op, x, projections, dtypes, norm, dtype)
        half = rotation.head_dim // 2
        cos = read("cos", rotation.cos, None, half)
        sin = read("sin", rotation.sin, cos.shape[0], half)
        position = ints("position", rotation.position, x.shape[0])
        turn = ffi.new("pylora_rotation *")
        turn.cosines, turn.sines, turn.position = mat(cos)[0], mat(sin)[0], at(position, _INT64)
        turn.head_dim, turn.layout = rotation.head_dim, _LAYOUTS["half"]
        finish = ffi.new("pylora_finish[3]", [(turn, ffi.NULL), (turn, ffi.NULL)])
        return self._together(op, x, projections, [dtype, dtype, v.dtype], norm, dtype, finish)

    def gate_up_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        dtype: Any = None,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray, np.ndarray | None]:
        if _mixed(projections):
            return super().gate_up_forward(x, projections, norm, dtype)
        gate, up = projections
        x = read_any("x", x, None, shape_of(up.W)[1])
        product = self.empty((x.shape[0], shape_of(up.W)[0]), F32 if dtype is None else dtype)
        to = mat(product)
        finish = ffi.new("pylora_finish[2]", [(ffi.NULL, ffi.NULL), (ffi.NULL, to)])
        results, rstd = self._together(
            "gate_up_forward", x, projections, [gate.dtype, up.dtype], norm, dtype, finish
        )
        return results, product, rstd

    def lora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        W: Packed | None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        need_dA: bool = True,
        need_dB: bool = True,
        dtype: Any = None,
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        projection = ProjectionGrad(dy, W, h, lora, drop)
        dx, [(dA, dB)] = self._backward(
            x, [projection], add, need_dx, need_dA, need_dB, dtype, "lora_backward"
        )
        return dx, dA, dB

    def linear_backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[np.ndarray | None, list[tuple[np.ndarray | None, np.ndarray | None]]]:
        kinds = {p.W.struct.dtype for p in projections if p.W is not None}
        if len(kinds) < 2:
            return self._backward(
                x, projections, add, need_dx, True, True, dtype, "linear_backward"
            )
        dx, grads = add, []  # a file may mix formats
        for p in projections:
            dx, one = self._backward(x, [p], dx, need_dx, True, True, None, "linear_backward")
            grads += one
        return (dx if dtype is None or add is not None else as_dtype(dx, dtype)), grads

    def _backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        add: Array | None,
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        dtype: Any,
        op: str,
    ) -> tuple[np.ndarray | None, list[tuple[np.ndarray | None, np.ndarray | None]]]:
        n = len(projections)
        first = projections[0]
        m = first.dy.shape[0]
        k = int(first.lora.A.shape[1]) if first.lora is not None else shape_of(first.W)[1]
        rows, keep, results, outputs, ranks = ffi.new("pylora_linear_grad[]", n), [], [], 0, 0
        used_x = need_dA and any(p.lora is not None for p in projections)
        x = read_any("x", x, m, k) if used_x else None
        for row, p in zip(rows, projections):
            d = shape_of(p.W)[0] if p.W is not None else None
            dy = read_any("dy", p.dy, m, d)
            d = dy.shape[1]
            low, *alive = adapter_or_struct(p.W, p.lora, p.drop, d, k)
            h = dA = dB = None
            if p.lora is not None:
                ranks += p.lora.rank
                if need_dA:
                    dA = self.empty((p.lora.rank, k))
                if need_dB:
                    h = read("h", p.h, m, p.lora.rank)
                    dB = self.empty((d, p.lora.rank))
            if need_dx:
                if shape_of(p.W) != (d, k):
                    raise ShapeError(f"W must be [{d}, {k}], got {list(shape_of(p.W))}")
                row.W = p.W.struct
            mats = [mat(a) for a in (dy, h, dA, dB)]
            row.lora, row.dy, row.h, row.dA, row.dB = low, *mats
            keep += [low, alive, dy, h, mats]
            outputs += d
            results.append((dA, dB))
        dx = None
        if need_dx and add is not None:
            dx = owned("add", add, m, k)
        elif need_dx:
            dx = self.empty((m, k), F32 if dtype is None else dtype)
        self._in_scratch(
            op,
            lib.pylora_linear_workspace, (m, n, outputs, k, ranks),
            lib.pylora_linear_backward, (mat(x), n, rows, mat(dx), add is not None),
        )  # fmt: skip
        return dx, results

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

    # ---- merge --------------------------------------------------------------------------------

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[np.ndarray, Residue]:
        code, W = stored("W", W, dtype)
        d, k = W.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        out, lossy = self.empty(W.shape, W.dtype), np.zeros(d, np.int64)
        void, ld = "void *", W.shape[1]
        rows = at(lossy, "int64_t *")
        status = lib.pylora_merge(code, d, k, at(W, void), ld, low, at(out, void), ld, rows)
        check(status, "merge")
        n = int(lossy.sum())
        position, bits = np.empty(n, np.int64), np.empty(n, np.uint32)
        if n:
            status = lib.pylora_merge_residue(
                code, d, k, at(W, void), ld, at(out, void), ld, low, rows,
                at(position, "int64_t *"), at(bits, "uint32_t *"),
            )  # fmt: skip
            check(status, "merge")
        return out, Residue(position, bits)

    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        code, own = stored("W", W, dtype)
        want_writable(W)
        d, k = own.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        to = at(own, "void *")
        check(lib.pylora_merge(code, d, k, to, k, low, to, k, ffi.NULL), "merge_in_place")
        if own is not W:  # it is not contiguous
            W[...] = own

    def unmerge(
        self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32"
    ) -> np.ndarray:
        code, merged = stored("merged", merged, dtype)
        d, k = merged.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        position = ints("residue.position", residue.position)
        bits = np.ascontiguousarray(residue.bits, np.uint32)
        want("residue.bits", bits, position.shape)
        out = self.empty(merged.shape, merged.dtype)
        status = lib.pylora_unmerge(
            code, d, k, at(merged, "void *"), k, low, position.size,
            at(position, "int64_t *"), at(bits, "uint32_t *"), at(out, "void *"), k,
        )  # fmt: skip
        check(status, "unmerge")
        return out

    # ---- transformer --------------------------------------------------------------------------

    def cast(self, x: Array, dtype: Any = None) -> np.ndarray:
        x = read_any("x", x, None, None)
        if dtype is None or x.dtype == dtype:
            return np.asarray(x)
        y = self.empty(x.shape, dtype)
        check(lib.pylora_cast(mat(x), mat(y)), "cast")
        return y

    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        x = read_any("x", x, None, None)
        m, k = x.shape
        w = np.ascontiguousarray(read("w", w, k))
        y, rstd = self.empty((m, k), F32 if dtype is None else dtype), np.empty(m, np.float32)
        check(lib.pylora_rms_norm_forward(mat(x), at(w), eps, mat(y), at(rstd)), "rms_norm")
        return y, rstd

    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        x = read_any("x", x, None, None)
        m, k = x.shape
        dy, w = read_any("dy", dy, m, k), np.ascontiguousarray(read("w", w, k))
        rstd = np.ascontiguousarray(read("rstd", rstd, m))
        dx = self.empty((m, k)) if add is None else owned("add", add, m, k)
        dw = np.empty(k, np.float32) if need_dw else None
        status = lib.pylora_rms_norm_backward(
            mat(dy), mat(x), at(w), at(rstd), mat(dx), add is not None, at(dw)
        )
        check(status, "rms_norm_backward")
        return dx, dw

    def rope(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        position: Array,
        head_dim: int,
        layout: str = "half",
        inverse: bool = False,
        dtype: Any = None,
    ) -> np.ndarray:
        x = read_any("x", x, None, None)
        cos, sin = read("cos", cos, None, head_dim // 2), read("sin", sin, None, head_dim // 2)
        position = ints("position", position, x.shape[0])
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        status = lib.pylora_rope(
            mat(x), mat(cos), mat(sin), at(position, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, mat(y),
        )  # fmt: skip
        check(status, "rope")
        return y

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = read_qkv(q, k, v, attn)
        o = self.empty(q.shape, F32 if dtype is None else dtype)
        lse = self.empty((q.shape[0], attn.heads))
        s, spec, keep = attention_structs(seqs, attn)
        inputs, outputs = (mat(q), mat(k), mat(v), s, spec), (mat(o), mat(lse))
        self._in_scratch(
            "attention_forward",
            lib.pylora_attention_workspace, (s, spec),
            lib.pylora_attention_forward, (*inputs, *outputs),
        )  # fmt: skip
        return o, lse

    def attention_backward(
        self,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        seqs: Seqs,
        attn: Attn,
        dtype: Any = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k, v = read_qkv(q, k, v, attn)
        do, o = read_any("do", do, *q.shape), read_any("o", o, *q.shape)
        lse = read("lse", lse, q.shape[0], attn.heads)
        kind = F32 if dtype is None else dtype
        # Keys that no sequence uses keep a gradient of zero.
        dq, dk, dv = self.empty(q.shape, kind), self.zeros(k.shape, kind), self.zeros(v.shape, kind)
        s, spec, keep = attention_structs(seqs, attn)
        inputs = *(mat(a) for a in (do, q, k, v, o, lse)), s, spec
        outputs = mat(dq), mat(dk), mat(dv)
        self._in_scratch(
            "attention_backward",
            lib.pylora_attention_workspace, (s, spec),
            lib.pylora_attention_backward, (*inputs, *outputs),
        )  # fmt: skip
        return dq, dk, dv

    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> np.ndarray:
        gate = read_any("gate", gate, None, None)
        up = read_any("up", up, *gate.shape)
        y = self.empty(gate.shape, F32 if dtype is None else dtype)
        check(lib.pylora_swiglu_forward(mat(gate), mat(up), mat(y)), "swiglu_forward")
        return y

    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        dy = read_any("dy", dy, None, None)
        gate, up = read_any("gate", gate, *dy.shape), read_any("up", up, *dy.shape)
        kind = F32 if dtype is None else dtype
        dgate, dup = self.empty(dy.shape, kind), self.empty(dy.shape, kind)
        status = lib.pylora_swiglu_backward(mat(dy), mat(gate), mat(up), mat(dgate), mat(dup))
        check(status, "swiglu_backward")
        return dgate, dup

    def embedding_forward(self, ids: Array, W: Packed) -> np.ndarray:
        ids, k = ints("ids", ids, None), shape_of(W)[1]
        y = self.empty((ids.size, k))
        status = lib.pylora_embedding_forward(at(ids, "int64_t *"), ids.size, W.struct, mat(y))
        check(status, "embedding_forward")
        return y

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> np.ndarray:
        dy = read("dy", dy, None, None)
        ids, dW = ints("ids", ids, dy.shape[0]), self.empty((rows, dy.shape[1]))
        status = lib.pylora_embedding_backward(at(ids, "int64_t *"), mat(dy), mat(dW))
        check(status, "embedding_backward")
        return dW

    def llama(self, weights: LlamaWeights) -> LlamaOp:
        return CLlama(weights, self, self._scratch)

    # ---- loss, optimizer, random numbers ------------------------------------------------------

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        nll, lse = np.empty(m, np.float32), np.empty(m, np.float32)
        status = lib.pylora_cross_entropy_forward(
            mat(logits), at(labels, "int64_t *"), at(nll), at(lse)
        )
        check(status, "cross_entropy_forward")
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> np.ndarray:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        lse = np.ascontiguousarray(read("lse", lse, m))
        weight = np.ascontiguousarray(read("weight", weight, m))
        d = logits if overwrite and logits.flags.writeable else self.empty(logits.shape)
        status = lib.pylora_cross_entropy_backward(
            mat(logits), at(labels, "int64_t *"), at(lse), at(weight), mat(d)
        )
        check(status, "cross_entropy_backward")
        return d

    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        weight = np.ascontiguousarray(read("weight", weight, m))
        nll, lse = np.empty(m, np.float32), np.empty(m, np.float32)
        d = logits if overwrite and logits.flags.writeable else self.empty(logits.shape)
        status = lib.pylora_cross_entropy(
            mat(logits), at(labels, "int64_t *"), at(weight), at(nll), at(lse), mat(d)
        )
        check(status, "cross_entropy")
        return nll, lse, d

    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None:
        n = param.size
        grad = np.ascontiguousarray(read("grad", grad, *param.shape))
        state = [writable(s, a, n) for s, a in (("param", param), ("m", m), ("v", v))]
        setting = ffi.new(
            "pylora_adamw *",
            (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_scale, o.step),
        )
        p, m_, v_ = (at(a) for a in state)
        check(lib.pylora_adamw_step(n, p, at(grad), m_, v_, setting), "adamw_step")

    def sum_squares(self, x: Array) -> float:
        x, out = np.ascontiguousarray(x), ffi.new("double *")
        x = read("x", x.reshape(-1), None)
        check(lib.pylora_sum_squares(x.size, at(x), out), "sum_squares")
        return float(out[0])

    def philox(self, seed: int, stream: int, first: int, n: int) -> np.ndarray:
        out: np.ndarray = np.empty(n, np.uint32)
        check(lib.pylora_philox(seed, stream, first, n, at(out, "uint32_t *")), "philox")
        return out

    def dropout(self, x: Array, drop: Drop | None) -> np.ndarray:
        x = read("x", x, None, None)
        if drop is None or drop.p == 0:
            return np.asarray(x)
        y = self.empty(x.shape)
        check(lib.pylora_dropout(mat(x), drop_struct(drop), mat(y)), "dropout")
        return y
