"""The C backend: the operations of `pylora.reference.Reference` on the compiled core, in float32.

Inputs may have any strides; a row whose elements do not lie side by side is copied first. The
interpreter lock is released while the core works.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pylora._core import ffi, lib
from pylora.backends.marshal import (
    F32,
    Packed,
    Scratch,
    at,
    attention_structs,
    check,
    drop_struct,
    ints,
    lora_struct,
    mat,
    owned,
    read,
    read_qkv,
    shape_of,
    stored,
    want,
    writable,
)
from pylora.backends.pool import Pool
from pylora.errors import BackendError, DtypeError, ShapeError
from pylora.types import AdamW, Array, Attn, Drop, LoRA, Residue, Seqs

_LAYOUTS = {"half": 0, "interleaved": 1}


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
        W = read("W", W, None, None)
        d, k = W.shape
        nbytes = lib.pylora_pack_bytes(lib.PYLORA_F32, d, k)
        buffer = np.empty(nbytes + 64, np.uint8)
        offset = -buffer.__array_interface__["data"][0] % 64
        data = buffer[offset : offset + nbytes]
        struct = ffi.new("pylora_packed *")
        check(lib.pylora_pack(lib.PYLORA_F32, mat(W), at(data, "void *"), struct), "pack")
        return Packed((d, k), data, struct)

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
    ) -> tuple[np.ndarray, np.ndarray | None]:
        d, k = shape_of(W)
        x = read("x", x, None, k)
        m = x.shape[0]
        if bias is not None:
            bias = np.ascontiguousarray(read("bias", bias, d))
        if residual is not None:
            residual = read("residual", residual, m, d)
        y, h = self.empty((m, d)), None
        low, A, B, cdrop = lora_struct(lora, drop, d, k)
        if lora is not None:
            h = self.empty((m, lora.rank))
        ws, ws_bytes = self._lora_scratch(m, d, k, lora)
        status = lib.pylora_lora_forward(
            mat(x), W.struct, at(bias), low, mat(residual), mat(y), mat(h), ws, ws_bytes
        )
        check(status, "lora_forward")
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
        dy = read("dy", dy, None, None if W is None else shape_of(W)[0])
        m, d = dy.shape
        k = lora.A.shape[1] if lora is not None else shape_of(W)[1]
        low, A, B, cdrop = lora_struct(lora, drop, d, k)
        dx = dA = dB = None
        if need_dx:
            if shape_of(W) != (d, k):
                raise ShapeError(f"W must be [{d}, {k}], got {list(shape_of(W))}")
            dx = self.empty((m, k)) if add is None else owned("add", add, m, k)
        if lora is not None and need_dA:
            x, dA = read("x", x, m, k), np.empty((lora.rank, k), np.float32)
        if lora is not None and need_dB:
            h, dB = read("h", h, m, lora.rank), np.empty((d, lora.rank), np.float32)
        ws, ws_bytes = self._lora_scratch(m, d, k, lora)
        status = lib.pylora_lora_backward(
            mat(dy),
            mat(x if dA is not None else None),
            mat(h if dB is not None else None),
            W.struct if dx is not None and W is not None else ffi.NULL,
            low,
            mat(dx),
            add is not None,
            mat(dA),
            mat(dB),
            ws,
            ws_bytes,
        )
        check(status, "lora_backward")
        return dx, dA, dB

    def _lora_scratch(self, m: int, d: int, k: int, lora: LoRA | None) -> tuple[Any, int]:
        rank = lora.rank if lora is not None else 0
        return self._scratch.at_least(lib.pylora_lora_workspace(m, d, k, rank))

    # ---- merge --------------------------------------------------------------------------------

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[np.ndarray, Residue]:
        code, W = stored("W", W, dtype)
        d, k = W.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        out, lossy = np.empty_like(W), np.zeros(d, np.int64)
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

    def unmerge(
        self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32"
    ) -> np.ndarray:
        code, merged = stored("merged", merged, dtype)
        d, k = merged.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        position = ints("residue.position", residue.position)
        bits = np.ascontiguousarray(residue.bits, np.uint32)
        want("residue.bits", bits, position.shape)
        out: np.ndarray = np.empty_like(merged)
        status = lib.pylora_unmerge(
            code, d, k, at(merged, "void *"), k, low, position.size,
            at(position, "int64_t *"), at(bits, "uint32_t *"), at(out, "void *"), k,
        )  # fmt: skip
        check(status, "unmerge")
        return out

    # ---- transformer --------------------------------------------------------------------------

    def rms_norm_forward(self, x: Array, w: Array, eps: float) -> tuple[np.ndarray, np.ndarray]:
        x = read("x", x, None, None)
        m, k = x.shape
        w = np.ascontiguousarray(read("w", w, k))
        y, rstd = self.empty((m, k)), np.empty(m, np.float32)
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
        x = read("x", x, None, None)
        m, k = x.shape
        dy, w = read("dy", dy, m, k), np.ascontiguousarray(read("w", w, k))
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
    ) -> np.ndarray:
        x = read("x", x, None, None)
        cos, sin = read("cos", cos, None, head_dim // 2), read("sin", sin, None, head_dim // 2)
        position = ints("position", position, x.shape[0])
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape)
        status = lib.pylora_rope(
            mat(x), mat(cos), mat(sin), at(position, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, mat(y),
        )  # fmt: skip
        check(status, "rope")
        return y

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn
    ) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = read_qkv(q, k, v, attn)
        o, lse = self.empty(q.shape), np.empty((q.shape[0], attn.heads), np.float32)
        s, spec, keep = attention_structs(seqs, attn)
        ws, ws_bytes = self._scratch.at_least(lib.pylora_attention_workspace(s, spec))
        status = lib.pylora_attention_forward(
            mat(q), mat(k), mat(v), s, spec, mat(o), mat(lse), ws, ws_bytes
        )
        check(status, "attention_forward")
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
        q, k, v = read_qkv(q, k, v, attn)
        do, o = read("do", do, *q.shape), read("o", o, *q.shape)
        lse = read("lse", lse, q.shape[0], attn.heads)
        # Keys that no sequence uses keep a gradient of zero.
        dq, dk, dv = self.empty(q.shape), self.zeros(k.shape), self.zeros(v.shape)
        s, spec, keep = attention_structs(seqs, attn)
        ws, ws_bytes = self._scratch.at_least(lib.pylora_attention_workspace(s, spec))
        status = lib.pylora_attention_backward(
            mat(do), mat(q), mat(k), mat(v), mat(o), mat(lse), s, spec,
            mat(dq), mat(dk), mat(dv), ws, ws_bytes,
        )  # fmt: skip
        check(status, "attention_backward")
        return dq, dk, dv

    def swiglu_forward(self, gate: Array, up: Array) -> np.ndarray:
        gate = read("gate", gate, None, None)
        up, y = read("up", up, *gate.shape), self.empty(gate.shape)
        check(lib.pylora_swiglu_forward(mat(gate), mat(up), mat(y)), "swiglu_forward")
        return y

    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[np.ndarray, np.ndarray]:
        dy = read("dy", dy, None, None)
        gate, up = read("gate", gate, *dy.shape), read("up", up, *dy.shape)
        dgate, dup = self.empty(dy.shape), self.empty(dy.shape)
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
