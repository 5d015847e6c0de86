"""The C backend: the operations of `pylora.reference.Reference` on the compiled core, in float32.

Inputs may have any strides; a row whose elements do not lie side by side is copied first. The
interpreter lock is released while the core works.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from pylora._core import ffi, lib
from pylora.backends.pool import Pool
from pylora.errors import BackendError, DtypeError, RangeError, ShapeError
from pylora.types import AdamW, Array, Attn, Drop, LoRA, Residue, Seqs

_F32 = np.dtype(np.float32)
_DTYPES = {"f32": (0, np.float32), "bf16": (1, np.uint16), "f16": (2, np.float16)}
_LAYOUTS = {"half": 0, "interleaved": 1}
_INDEX_ERROR = 4  # PYLORA_E_INDEX


class Packed:
    """A frozen weight [d, k] in the order that the kernels read. It is never written to."""

    def __init__(self, shape: tuple[int, int], data: np.ndarray, struct: Any) -> None:
        self.shape = shape
        self.dtype = _F32
        self.nbytes = data.nbytes
        self._data = data
        self.struct = struct


def _check(status: int, op: str) -> None:
    if status:
        text = ffi.string(lib.pylora_status_text(status)).decode()
        raise (RangeError if status == _INDEX_ERROR else BackendError)(f"{op}: {text}")


def _in(name: str, a: Array, *shape: int | None) -> np.ndarray:
    """`a`, checked, as a float32 array the core can read in place: a copy only where it cannot."""
    if not isinstance(a, np.ndarray) or a.dtype != _F32:
        got = getattr(a, "dtype", type(a).__name__)
        raise DtypeError(
            f"{name}: the c backend computes in float32, got {got}; "
            "convert it, or use the numpy backend for float64"
        )
    _want(name, a, shape)
    strides = a.strides
    if a.flags.aligned and strides and strides[-1] == 4 and (a.ndim == 1 or strides[0] % 4 == 0):
        return a
    return np.ascontiguousarray(a)


def _want(name: str, a: Array, shape: tuple[int | None, ...]) -> None:
    if a.ndim != len(shape) or any(w is not None and w != g for w, g in zip(shape, a.shape)):
        expected = ", ".join("any" if w is None else str(w) for w in shape)
        raise ShapeError(f"{name} must have the shape [{expected}], got {list(a.shape)}")


def _ints(name: str, a: Any, n: int | None = None) -> np.ndarray:
    v = np.ascontiguousarray(a)
    if v.dtype.kind not in "iu":
        raise DtypeError(f"{name} must be integers, got {v.dtype}")
    _want(name, v, (n,))
    return v.astype(np.int64, copy=False)


def _at(a: np.ndarray | None, ctype: str = "float *") -> Any:
    """Pointer to the first element. The caller keeps the array alive."""
    return ffi.NULL if a is None else ffi.cast(ctype, a.__array_interface__["data"][0])


def _mat(a: np.ndarray | None) -> Any:
    """A pylora_mat over a checked array. The caller keeps the array alive."""
    if a is None:
        return ffi.NULL
    return ffi.new("pylora_mat *", (_at(a), a.shape[0], a.shape[1], a.strides[0] // 4))


def _in_place(name: str, a: Array, n: int) -> np.ndarray:
    if not isinstance(a, np.ndarray) or a.dtype != _F32 or not a.flags.c_contiguous or a.size != n:
        raise ShapeError(
            f"{name} is updated in place: it must be a contiguous float32 array of {n}"
        )
    if not a.flags.writeable:
        raise ShapeError(f"{name} is updated in place, but the array is read-only")
    return a


class _Scratch(threading.local):
    """One workspace per Python thread, grown when an operation needs more."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)

    def at_least(self, nbytes: int) -> tuple[Any, int]:
        if self.buffer.nbytes < nbytes:
            self.buffer = np.empty(nbytes, np.uint8)
        return _at(self.buffer, "void *"), self.buffer.nbytes


class CBackend:
    """The compiled core. `Reference`'s docstrings are the specification of every operation."""

    name = "c"
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
        self._pool = Pool(ffi)
        self._scratch = _Scratch()

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
        if array.dtype != _F32:
            raise DtypeError(
                f"the c backend computes in float32, got {array.dtype}; convert it first"
            )
        return array

    def to_numpy(self, a: np.ndarray) -> np.ndarray:
        return a

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return self._pool.empty((shape,) if isinstance(shape, int) else tuple(shape), dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        a = self.empty(shape, dtype)
        a.fill(0)
        return a

    def trim(self) -> None:
        """Gives the memory of dead arrays back to the system."""
        self._pool.trim()

    def pack(self, W: Array) -> Packed:
        """W [d, k] in panels of 32 outputs. The copy is the only one the model needs."""
        W = _in("W", W, None, None)
        d, k = W.shape
        nbytes = lib.pylora_pack_bytes(d, k)
        buffer = np.empty(nbytes + 64, np.uint8)
        offset = -buffer.__array_interface__["data"][0] % 64
        data = buffer[offset : offset + nbytes]
        struct = ffi.new("pylora_packed *")
        _check(lib.pylora_pack(_mat(W), _at(data, "void *"), struct), "pack")
        return Packed((d, k), data, struct)

    def unpack(self, P: Packed) -> np.ndarray:
        W = np.empty(P.shape, np.float32)
        _check(lib.pylora_unpack(P.struct, _mat(W)), "unpack")
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
    ) -> tuple[np.ndarray, np.ndarray | None]:
        d, k = _shape(W)
        x = _in("x", x, None, k)
        m = x.shape[0]
        if bias is not None:
            bias = np.ascontiguousarray(_in("bias", bias, d))
        if residual is not None:
            residual = _in("residual", residual, m, d)
        y, h = self.empty((m, d)), None
        low, A, B, cdrop = _lora(lora, drop, d, k)
        if lora is not None:
            h = self.empty((m, lora.rank))
        ws, ws_bytes = self._lora_scratch(m, d, k, lora)
        status = lib.pylora_lora_forward(
            _mat(x), W.struct, _at(bias), low, _mat(residual), _mat(y), _mat(h), ws, ws_bytes
        )
        _check(status, "lora_forward")
        return y, h

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
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        dy = _in("dy", dy, None, None if W is None else _shape(W)[0])
        m, d = dy.shape
        k = lora.A.shape[1] if lora is not None else _shape(W)[1]
        low, A, B, cdrop = _lora(lora, drop, d, k)
        dx = dA = dB = None
        if need_dx:
            if _shape(W) != (d, k):
                raise ShapeError(f"W must be [{d}, {k}], got {list(_shape(W))}")
            dx = self.empty((m, k)) if add is None else _owned("add", add, m, k)
        if lora is not None and need_dA:
            x, dA = _in("x", x, m, k), np.empty((lora.rank, k), np.float32)
        if lora is not None and need_dB:
            h, dB = _in("h", h, m, lora.rank), np.empty((d, lora.rank), np.float32)
        ws, ws_bytes = self._lora_scratch(m, d, k, lora)
        status = lib.pylora_lora_backward(
            _mat(dy),
            _mat(x if dA is not None else None),
            _mat(h if dB is not None else None),
            W.struct if dx is not None and W is not None else ffi.NULL,
            low,
            _mat(dx),
            add is not None,
            _mat(dA),
            _mat(dB),
            ws,
            ws_bytes,
        )
        _check(status, "lora_backward")
        return dx, dA, dB

    def _lora_scratch(self, m: int, d: int, k: int, lora: LoRA | None) -> tuple[Any, int]:
        rank = lora.rank if lora is not None else 0
        return self._scratch.at_least(lib.pylora_lora_workspace(m, d, k, rank))

    # ---- merge --------------------------------------------------------------------------------

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[np.ndarray, Residue]:
        code, W = _stored("W", W, dtype)
        d, k = W.shape
        low, A, B, _ = _lora(lora, None, d, k)
        out, lossy = np.empty_like(W), np.zeros(d, np.int64)
        void, ld = "void *", W.shape[1]
        rows = _at(lossy, "int64_t *")
        status = lib.pylora_merge(code, d, k, _at(W, void), ld, low, _at(out, void), ld, rows)
        _check(status, "merge")
        n = int(lossy.sum())
        position, bits = np.empty(n, np.int64), np.empty(n, np.uint32)
        if n:
            status = lib.pylora_merge_residue(
                code, d, k, _at(W, void), ld, _at(out, void), ld, low, rows,
                _at(position, "int64_t *"), _at(bits, "uint32_t *"),
            )  # fmt: skip
            _check(status, "merge")
        return out, Residue(position, bits)

    def unmerge(
        self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32"
    ) -> np.ndarray:
        code, merged = _stored("merged", merged, dtype)
        d, k = merged.shape
        low, A, B, _ = _lora(lora, None, d, k)
        position = _ints("residue.position", residue.position)
        bits = np.ascontiguousarray(residue.bits, np.uint32)
        _want("residue.bits", bits, position.shape)
        out: np.ndarray = np.empty_like(merged)
        status = lib.pylora_unmerge(
            code, d, k, _at(merged, "void *"), k, low, position.size,
            _at(position, "int64_t *"), _at(bits, "uint32_t *"), _at(out, "void *"), k,
        )  # fmt: skip
        _check(status, "unmerge")
        return out

    # ---- transformer --------------------------------------------------------------------------

    def rms_norm_forward(self, x: Array, w: Array, eps: float) -> tuple[np.ndarray, np.ndarray]:
        x = _in("x", x, None, None)
        m, k = x.shape
        w = np.ascontiguousarray(_in("w", w, k))
        y, rstd = self.empty((m, k)), np.empty(m, np.float32)
        _check(lib.pylora_rms_norm_forward(_mat(x), _at(w), eps, _mat(y), _at(rstd)), "rms_norm")
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
        x = _in("x", x, None, None)
        m, k = x.shape
        dy, w = _in("dy", dy, m, k), np.ascontiguousarray(_in("w", w, k))
        rstd = np.ascontiguousarray(_in("rstd", rstd, m))
        dx = self.empty((m, k)) if add is None else _owned("add", add, m, k)
        dw = np.empty(k, np.float32) if need_dw else None
        status = lib.pylora_rms_norm_backward(
            _mat(dy), _mat(x), _at(w), _at(rstd), _mat(dx), add is not None, _at(dw)
        )
        _check(status, "rms_norm_backward")
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
    ) -> np.ndarray:
        x = _in("x", x, None, None)
        cos, sin = _in("cos", cos, None, head_dim // 2), _in("sin", sin, None, head_dim // 2)
        position = _ints("position", position, x.shape[0])
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape)
        status = lib.pylora_rope(
            _mat(x), _mat(cos), _mat(sin), _at(position, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, _mat(y),
        )  # fmt: skip
        _check(status, "rope")
        return y

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn
    ) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = _qkv(q, k, v, attn)
        o, lse = self.empty(q.shape), np.empty((q.shape[0], attn.heads), np.float32)
        s, spec, keep = _attention(seqs, attn)
        ws, ws_bytes = self._scratch.at_least(lib.pylora_attention_workspace(s, spec))
        status = lib.pylora_attention_forward(
            _mat(q), _mat(k), _mat(v), s, spec, _mat(o), _mat(lse), ws, ws_bytes
        )
        _check(status, "attention_forward")
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
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k, v = _qkv(q, k, v, attn)
        do, o = _in("do", do, *q.shape), _in("o", o, *q.shape)
        lse = _in("lse", lse, q.shape[0], attn.heads)
        # Keys that no sequence uses keep a gradient of zero.
        dq, dk, dv = self.empty(q.shape), self.zeros(k.shape), self.zeros(v.shape)
        s, spec, keep = _attention(seqs, attn)
        ws, ws_bytes = self._scratch.at_least(lib.pylora_attention_workspace(s, spec))
        status = lib.pylora_attention_backward(
            _mat(do), _mat(q), _mat(k), _mat(v), _mat(o), _mat(lse), s, spec,
            _mat(dq), _mat(dk), _mat(dv), ws, ws_bytes,
        )  # fmt: skip
        _check(status, "attention_backward")
        return dq, dk, dv

    def swiglu_forward(self, gate: Array, up: Array) -> np.ndarray:
        gate = _in("gate", gate, None, None)
        up, y = _in("up", up, *gate.shape), self.empty(gate.shape)
        _check(lib.pylora_swiglu_forward(_mat(gate), _mat(up), _mat(y)), "swiglu_forward")
        return y

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[np.ndarray, np.ndarray]:
        dy = _in("dy", dy, None, None)
        gate, up = _in("gate", gate, *dy.shape), _in("up", up, *dy.shape)
        dgate, dup = self.empty(dy.shape), self.empty(dy.shape)
        status = lib.pylora_swiglu_backward(_mat(dy), _mat(gate), _mat(up), _mat(dgate), _mat(dup))
        _check(status, "swiglu_backward")
        return dgate, dup

    def embedding_forward(self, ids: Array, W: Packed) -> np.ndarray:
        ids, k = _ints("ids", ids, None), _shape(W)[1]
        y = self.empty((ids.size, k))
        status = lib.pylora_embedding_forward(_at(ids, "int64_t *"), ids.size, W.struct, _mat(y))
        _check(status, "embedding_forward")
        return y

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> np.ndarray:
        dy = _in("dy", dy, None, None)
        ids, dW = _ints("ids", ids, dy.shape[0]), self.empty((rows, dy.shape[1]))
        status = lib.pylora_embedding_backward(_at(ids, "int64_t *"), _mat(dy), _mat(dW))
        _check(status, "embedding_backward")
        return dW

    # ---- loss, optimizer, random numbers ------------------------------------------------------

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        logits = _in("logits", logits, None, None)
        m = logits.shape[0]
        labels = _ints("labels", labels, m)
        nll, lse = np.empty(m, np.float32), np.empty(m, np.float32)
        status = lib.pylora_cross_entropy_forward(
            _mat(logits), _at(labels, "int64_t *"), _at(nll), _at(lse)
        )
        _check(status, "cross_entropy_forward")
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> np.ndarray:
        logits = _in("logits", logits, None, None)
        m = logits.shape[0]
        labels = _ints("labels", labels, m)
        lse = np.ascontiguousarray(_in("lse", lse, m))
        weight = np.ascontiguousarray(_in("weight", weight, m))
        d = logits if overwrite and logits.flags.writeable else self.empty(logits.shape)
        status = lib.pylora_cross_entropy_backward(
            _mat(logits), _at(labels, "int64_t *"), _at(lse), _at(weight), _mat(d)
        )
        _check(status, "cross_entropy_backward")
        return d

    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None:
        n = param.size
        grad = np.ascontiguousarray(_in("grad", grad, *param.shape))
        state = [_in_place(s, a, n) for s, a in (("param", param), ("m", m), ("v", v))]
        setting = ffi.new(
            "pylora_adamw *",
            (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_scale, o.step),
        )
        p, m_, v_ = (_at(a) for a in state)
        _check(lib.pylora_adamw_step(n, p, _at(grad), m_, v_, setting), "adamw_step")

    def sum_squares(self, x: Array) -> float:
        x, out = np.ascontiguousarray(x), ffi.new("double *")
        x = _in("x", x.reshape(-1), None)
        _check(lib.pylora_sum_squares(x.size, _at(x), out), "sum_squares")
        return float(out[0])

    def philox(self, seed: int, stream: int, first: int, n: int) -> np.ndarray:
        out: np.ndarray = np.empty(n, np.uint32)
        _check(lib.pylora_philox(seed, stream, first, n, _at(out, "uint32_t *")), "philox")
        return out

    def dropout(self, x: Array, drop: Drop | None) -> np.ndarray:
        x = _in("x", x, None, None)
        if drop is None or drop.p == 0:
            return np.asarray(x)
        y = self.empty(x.shape)
        _check(lib.pylora_dropout(_mat(x), _drop(drop), _mat(y)), "dropout")
        return y


def _shape(W: Packed | None) -> tuple[int, int]:
    if not isinstance(W, Packed):
        raise DtypeError(f"W must be a weight packed by this backend, got {type(W).__name__}")
    return W.shape


def _owned(name: str, a: Array, m: int, k: int) -> np.ndarray:
    """An array that may be overwritten: itself if the core can write to it, else a copy."""
    checked = _in(name, a, m, k)
    return checked if checked.flags.writeable else checked.copy()


def _drop(drop: Drop | None) -> Any:
    if drop is None or drop.p == 0:
        return ffi.NULL
    if not 0 <= drop.p < 1:
        raise ShapeError(f"the dropout probability must be in [0, 1), got {drop.p}")
    return ffi.new("pylora_drop *", (drop.p, drop.seed, drop.stream, drop.row0))


def _lora(lora: LoRA | None, drop: Drop | None, d: int, k: int) -> tuple[Any, Any, Any, Any]:
    """The pylora_lora of an adapter and everything that must stay alive beside it."""
    if lora is None:
        return ffi.NULL, None, None, None
    A = _in("A", lora.A, None, k)
    B = _in("B", lora.B, d, A.shape[0])
    cdrop = _drop(drop)
    low = (A.shape[0], _at(A), A.strides[0] // 4, _at(B), B.strides[0] // 4, lora.scale, cdrop)
    return ffi.new("pylora_lora *", low), A, B, cdrop


def _qkv(q: Array, k: Array, v: Array, attn: Attn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k = _in("k", k, None, attn.kv_heads * attn.head_dim)
    q = _in("q", q, None, attn.heads * attn.head_dim)
    return q, k, _in("v", v, *k.shape)


def _attention(seqs: Seqs, attn: Attn) -> tuple[Any, Any, Any]:
    """(pylora_seqs, pylora_attn, what must stay alive)."""
    start = _ints("seqs.k_start", seqs.k_start)
    n = start.size
    q, length = _ints("seqs.q_start", seqs.q_start, n + 1), _ints("seqs.k_len", seqs.k_len, n)
    i64 = "int64_t *"
    s = ffi.new("pylora_seqs *", (n, _at(q, i64), _at(start, i64), _at(length, i64)))
    spec = (attn.heads, attn.kv_heads, attn.head_dim, attn.window, attn.scale)
    return s, ffi.new("pylora_attn *", spec), (q, start, length)


def _stored(name: str, W: Array, dtype: str) -> tuple[int, np.ndarray]:
    """(dtype code, C-contiguous array) of a weight in its stored form."""
    if dtype not in _DTYPES:
        raise DtypeError(f"merge: dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    code, kind = _DTYPES[dtype]
    if not isinstance(W, np.ndarray) or W.dtype != kind:
        raise DtypeError(f"{name}: stored as {dtype} must be an array of {np.dtype(kind)}")
    _want(name, W, (None, None))
    return code, np.ascontiguousarray(W)
