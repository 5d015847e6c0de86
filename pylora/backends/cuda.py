"""The CUDA backend: the operations of `pylora.reference.Reference` on libpylora_cuda.

Arrays are CuPy's, or any that has __cuda_array_interface__; work is queued on CuPy's current
stream, and outputs and workspaces come from its memory pool. Index arrays of the host are checked
and copied to the device; those of the device are taken as they are, and a kernel that meets one out
of range says so at the next copy to the host. Nothing here waits for the device but that copy.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pylora.backends.cuda_lib import library
from pylora.backends.cuda_marshal import (
    CODES,
    DTYPES,
    F16,
    F32,
    Marshal,
    Packed,
    PlacedSeqs,
    aligned,
    check_seqs,
    longest,
    want,
)
from pylora.backends.device import DeviceArrays, open_cupy
from pylora.errors import BackendError, DtypeError, ShapeError, UnsupportedError
from pylora.numbers.precision import BF16, Stored, check_precision
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.plain import Plain, want_writable
from pylora.ops.repeat import Repeated
from pylora.types import (
    AdamW,
    Array,
    Attn,
    Drop,
    LoRA,
    Projection,
    ProjectionGrad,
    Residue,
    Seqs,
)

_LAYOUTS = {"half": 0, "interleaved": 1}
_MERGED = {"f32": (0, np.float32), "bf16": (1, np.uint16), "f16": (2, np.float16)}


class _Own(threading.local):
    """What a thread that captures a graph takes memory from: workspaces, and where gradients go."""

    workspaces: list[Array] | None = None
    results: Array | None = None
    used = 0


class CudaBackend(DeviceArrays, Plain):
    """The compiled CUDA library. `Reference`'s docstrings specify every operation."""

    name = "cuda"

    def __init__(self, device: int | None = None) -> None:
        """On a GPU by its number; default: PYLORA_CUDA_DEVICE, else CuPy's current one. It becomes
        CuPy's current device of this thread, as that is where arrays are made."""
        self.cuda = library()
        self.xp = open_cupy()
        if device is None:
            device = _device_asked_for()
        if device is None:
            device = int(self.xp.cuda.Device().id)
        count = self.cuda.devices()
        if not 0 <= device < count:
            raise BackendError(f"there is no GPU {device}; {self.cuda.error() or f'{count} found'}")
        self.device = device
        self.xp.cuda.Device(device).use()
        self.context = self.cuda.open(device)
        self.ffi, self.lib = self.cuda.ffi, self.cuda.lib
        self.to = Marshal(self.xp, self.ffi)
        self._workspaces: dict[tuple[int, int], Array] = {}
        self._own = _Own()
        self.tf32 = False

    # ---- how a function of the library is called ----------------------------------------------

    @property
    def _stream(self) -> Any:
        return self.ffi.cast("void *", self.xp.cuda.get_current_stream().ptr)

    def call(self, op: str, *args: Any) -> None:
        """pylora_cuda_<op>(context, stream, ...)"""
        if (now := self.xp.cuda.runtime.getDevice()) != self.device:
            raise BackendError(
                f"{op}: CuPy's current device in this thread is {now}, and the backend's is "
                f"{self.device}; call cupy.cuda.Device({self.device}).use() in it first"
            )
        function = getattr(self.lib, f"pylora_cuda_{op}")
        self.cuda.check(function(self.context, self._stream, *args), op)

    def workspace(self, nbytes: int) -> tuple[Any, int]:
        """Device memory of the current stream for the length of one operation; each thread has its
        own, since another's might be let go before the operation is queued."""
        key = threading.get_ident(), int(self.xp.cuda.get_current_stream().ptr)
        own = self._own.workspaces
        if own is not None:  # what one operation has used the next may use
            if not own or own[-1].nbytes < nbytes:
                own.append(self.xp.empty(max(nbytes, 1 << 16), np.uint8))
            return self.to.at(own[-1], "void *"), int(own[-1].nbytes)
        held = self._workspaces.get(key)
        if held is None or held.nbytes < nbytes:
            held = self._workspaces[key] = self.xp.empty(max(nbytes, 1 << 16), np.uint8)
        return self.to.at(held, "void *"), int(held.nbytes)

    @contextmanager
    def own_workspace(self, results: Array | None = None) -> Iterator[list[Array]]:
        """While this thread captures a graph: its workspaces are no one else's. They are what is
        yielded. Adapters' gradients are laid one behind the other in `results`, while it lasts."""
        own = self._own
        own.workspaces, own.results, own.used = [], results, 0
        try:
            yield own.workspaces
        finally:
            own.workspaces = own.results = None

    def _gradient(self, shape: tuple[int, int]) -> Array:
        """Memory of a gradient of A or B."""
        own, size = self._own, 4 * shape[0] * shape[1]
        if own.results is None or own.used + size > own.results.nbytes:
            return self.empty(shape)
        first, own.used = own.used, own.used + aligned(size)
        return own.results[first : first + size].view(F32).reshape(shape)

    def repeated(self) -> Repeated:
        from pylora.backends.cuda_steps import CudaSteps

        return CudaSteps(self)

    # ---- arrays -------------------------------------------------------------------------------

    def asarray(self, a: Any) -> Array:
        """A C-contiguous float32 array of `a` on the GPU; other dtypes are refused."""
        array = self.xp.ascontiguousarray(self.on_device(a))
        if array.dtype != F32:
            raise DtypeError(
                f"the cuda backend computes in float32, got {array.dtype}; convert it first"
            )
        return array

    def to_numpy(self, a: Any) -> np.ndarray:
        if not isinstance(a, np.ndarray):
            self.cuda.check(self.lib.pylora_cuda_check(self.context, self._stream), "cuda")
        return super().to_numpy(a)

    def allow_tf32(self, allow: bool) -> None:
        """Lets float32 products round their factors to TF32 (10 bits); off unless asked for."""
        self.cuda.check(self.lib.pylora_cuda_set_tf32(self.context, allow), "set_tf32")
        self.tf32 = allow

    # ---- precision ----------------------------------------------------------------------------

    def computes(self, precision: str) -> str:
        if check_precision(precision) in ("int8", "int4"):
            raise UnsupportedError(
                f"the cuda backend does not compute in {precision}; choose one of "
                "fp32, bf16, fp16, or --backend c"
            )
        return "fp32" if precision == "fp32x3" else precision

    def activation_dtype(self, precision: str) -> Any:
        """The dtype of arrays that only feed products; None: the computation's own."""
        computed = self.computes(precision)
        return None if computed == "fp32" else BF16 if computed == "bf16" else F16

    def pack(self, W: Array | Stored, precision: str = "fp32") -> Packed:
        """W [d, k] as `precision` stores it. A contiguous array of that dtype is taken as it is:
        the caller gives it away."""
        precision = self.computes(precision)
        if isinstance(W, Stored):
            if W.kind == "bf16":
                W = np.ascontiguousarray(W.rows).view(np.uint16).reshape(W.shape)
            else:
                from pylora.numbers.quantize import dequantize

                W = dequantize(W)
        W = self.to.read("W", self.on_device(W), None, None)
        d, k = (int(n) for n in W.shape)
        code, nbytes = CODES[precision], self.lib.pylora_cuda_pack_bytes(CODES[precision], d, k)
        aligned = W.data.ptr % 256 == 0 and W.flags.c_contiguous
        own = aligned and W.dtype == DTYPES[precision]
        data = W if own else self.xp.empty(nbytes, np.uint8)
        struct = self.ffi.new("pylora_packed *")
        self.call("pack", code, self.to.mat(W), self.to.at(data, "void *"), struct)
        return Packed((d, k), precision, data, struct)

    def unpack(self, P: Packed) -> Array:
        own = P.data.view(DTYPES[P.precision]).reshape(-1)[: P.shape[0] * P.shape[1]]
        return self.cast(own.reshape(P.shape), F32).copy()

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
    ) -> tuple[Array, Array | None]:
        return self.linear_forward(x, [Projection(W, bias, lora, drop, residual, dtype)])[0]

    def linear_forward(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[Array, Array | None]]:
        kinds = {packed(p.W).precision for p in projections}
        if len(kinds) > 1:
            return [self.linear_forward(x, [p])[0] for p in projections]
        structs, results = [], []
        m, k = x.shape[0], packed(projections[0].W).shape[1] if projections else 0
        for p in projections:
            low, keep = self.to.lora(p.lora, p.drop, *p.W.shape)
            h = None if p.lora is None else self.empty((m, p.lora.rank))
            structs.append((p, [low], h, keep))
        x = self.to.read("x", x, None, k)
        ys = self.segmented(x, [(p, lows, h) for p, lows, h, _ in structs], None)
        results = [(y, h) for y, (_, _, h, _) in zip(ys, structs)]
        return results

    def segmented(
        self,
        x: Array,
        parts: Sequence[tuple[Projection, Sequence[Any], Array | None]],
        start: Sequence[int] | None,
    ) -> list[Array]:
        """y of each (projection, pylora_lora of each segment, h): rows start[i] .. start[i+1]-1 of
        x are segment i. Of a projection its adapter and dropout are not read."""
        ffi, to, n = self.ffi, self.to, len(parts)
        segments = 1 if start is None else len(start) - 1
        rows, keep, ys, outputs, ranks = ffi.new("pylora_linear[]", n), [], [], 0, 0
        m, k = x.shape
        for row, (p, lows, h) in zip(rows, parts):
            d, inputs = packed(p.W).shape
            if inputs != k:
                raise ShapeError(f"x must have the shape [any, {inputs}], got {list(x.shape)}")
            y = self.empty((m, d), F32 if p.dtype is None else p.dtype)
            row.W, row.y, row.h = p.W.struct, (cy := to.mat(y)), (ch := to.mat(h))
            keep += [cy, ch]
            if any(low != ffi.NULL for low in lows):
                row.lora = table = ffi.new("pylora_lora *[]", list(lows))
                keep.append(table)
                ranks += max(int(low.r) for low in lows if low != ffi.NULL)
            if p.bias is not None:
                bias = to.vector("bias", p.bias, d)
                row.bias = to.at(bias)
                keep.append(bias)
            if p.residual is not None:
                residual = to.read("residual", p.residual, m, d, narrow=False)
                row.residual = res = to.mat(residual)
                keep += [residual, res]
            outputs += d
            ys.append(y)
        need = self.lib.pylora_cuda_linear_workspace(
            self.context, m, n, outputs, k, ranks, segments
        )
        seg = ffi.NULL if start is None else ffi.new("int64_t[]", [int(s) for s in start])
        self.call("linear_forward", to.mat(x), n, rows, segments, seg, *self.workspace(need))
        return ys

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
    ) -> tuple[Array | None, Array | None, Array | None]:
        one = [ProjectionGrad(dy, W, h, lora, drop)]
        dx, [(dA, dB)] = self._backward(x, one, add, need_dx, need_dA, need_dB, dtype)
        return dx, dA, dB

    def linear_backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]:
        kinds = {p.W.precision for p in projections if p.W is not None}
        if len(kinds) < 2:
            return self._backward(x, projections, add, need_dx, True, True, dtype)
        dx, grads = add, []
        for p in projections:
            dx, one = self._backward(x, [p], dx, need_dx, True, True, None)
            grads += one
        return (dx if dx is None or add is not None else self.cast(dx, dtype)), grads

    def _backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        add: Array | None,
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        dtype: Any,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]:
        ffi, to, n, first = self.ffi, self.to, len(projections), projections[0]
        m = first.dy.shape[0]
        k = int(first.lora.A.shape[1]) if first.lora is not None else packed(first.W).shape[1]
        rows, keep, results = ffi.new("pylora_linear_grad[]", n), [], []
        outputs = ranks = 0
        used_x = need_dA and any(p.lora is not None for p in projections)
        x = to.read("x", x, m, k) if used_x else None
        for row, p in zip(rows, projections):
            d = packed(p.W).shape[0] if p.W is not None else None
            dy = to.read("dy", p.dy, m, d)
            d = int(dy.shape[1])
            low, alive = to.lora(p.lora, p.drop, d, k)
            h = dA = dB = None
            if p.lora is not None:
                ranks += p.lora.rank
                dA = self._gradient((p.lora.rank, k)) if need_dA else None
                if need_dB:
                    h = to.read("h", p.h, m, p.lora.rank)
                    dB = self._gradient((d, p.lora.rank))
            if need_dx:
                if packed(p.W).shape != (d, k):
                    raise ShapeError(f"W must be [{d}, {k}], got {list(p.W.shape)}")
                row.W = p.W.struct
            mats = [to.mat(a) for a in (dy, h, dA, dB)]
            row.lora, row.dy, row.h, row.dA, row.dB = low, *mats
            keep += [low, alive, dy, h, mats]
            outputs += d
            results.append((dA, dB))
        dx = None
        if need_dx and add is not None:
            dx = to.read("add", add, m, k, narrow=False)
        elif need_dx:
            dx = self.empty((m, k), F32 if dtype is None else dtype)
        need = self.lib.pylora_cuda_linear_workspace(self.context, m, n, outputs, k, ranks, 1)
        self.call(
            "linear_backward", to.mat(x), n, rows, to.mat(dx), add is not None,
            *self.workspace(need),
        )  # fmt: skip
        return dx, results

    # ---- merge --------------------------------------------------------------------------------

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]:
        """Of a weight on the host the results are on the host, too."""
        code, on_device, back = self._stored("W", W, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        out, lossy = self.xp.empty_like(on_device), self.xp.zeros(d, np.int64)
        void, i64 = "void *", "int64_t *"
        source, merged = to.at(on_device, void), to.at(out, void)
        self.call("merge", code, d, k, source, k, low, merged, k, to.at(lossy, i64))
        first = self.xp.cumsum(lossy) - lossy
        n = int(lossy.sum())
        position, bits = self.xp.empty(n, np.int64), self.xp.empty(n, np.uint32)
        if n:
            self.call(
                "merge_residue", code, d, k, source, k, merged, k, low, to.at(first, i64),
                to.at(position, i64), to.at(bits, "uint32_t *"),
            )  # fmt: skip
        return back(out), Residue(back(position), back(bits))

    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        want_writable(W)
        code, on_device, back = self._stored("W", W, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        weight = to.at(on_device, "void *")
        self.call("merge", code, d, k, weight, k, low, weight, k, self.ffi.NULL)
        if on_device is not W:
            W[...] = back(on_device)

    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array:
        code, on_device, back = self._stored("merged", merged, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        position = self.checked_index("residue position", residue.position, d * k)
        bits = self.xp.asarray(residue.bits)
        if bits.dtype != np.uint32 or bits.shape != position.shape:
            raise ShapeError("residue.bits must be uint32, one for each position")
        out = self.xp.empty_like(on_device)
        self.call(
            "unmerge", code, d, k, to.at(on_device, "void *"), k, low, position.size,
            to.at(position, "int64_t *"), to.at(bits, "uint32_t *"), to.at(out, "void *"), k,
        )  # fmt: skip
        return back(out)

    def _placed(self, lora: LoRA) -> LoRA:
        return LoRA(self.place(lora.A), self.place(lora.B), lora.scale)

    def _stored(self, name: str, W: Array, dtype: str) -> tuple[int, Array, Callable[[Any], Any]]:
        """(dtype code, contiguous array on the device, how results go back to where W was)."""
        if dtype not in _MERGED:
            raise DtypeError(f"merge: dtype must be one of {', '.join(_MERGED)}, got {dtype!r}")
        code, kind = _MERGED[dtype]
        if getattr(W, "dtype", None) != kind:
            raise DtypeError(f"{name}: stored as {dtype} must be an array of {np.dtype(kind)}")
        want(name, W, (None, None))
        host = isinstance(W, np.ndarray)
        back = self.xp.asnumpy if host else lambda a: a
        return code, self.xp.ascontiguousarray(self.xp.asarray(W)), back

    # ---- transformer --------------------------------------------------------------------------

    def cast(self, x: Array, dtype: Any = None) -> Array:
        x = self.to.read("x", x, None, None)
        if dtype is None or x.dtype == self.dtype_of(dtype):
            return x
        y = self.empty(x.shape, dtype)
        self.call("cast", self.to.mat(x), self.to.mat(y))
        return y

    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        to = self.to
        x = to.read("x", x, None, None)
        m, k = x.shape
        w = to.vector("w", w, k)
        y, rstd = self.empty((m, k), F32 if dtype is None else dtype), self.empty(m)
        self.call("rms_norm_forward", to.mat(x), to.at(w), eps, to.mat(y), to.at(rstd))
        return y, rstd

    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[Array, Array | None]:
        to = self.to
        x = to.read("x", x, None, None)
        m, k = x.shape
        dy, w, rstd = to.read("dy", dy, m, k), to.vector("w", w, k), to.vector("rstd", rstd, m)
        dx = self.empty((m, k)) if add is None else to.read("add", add, m, k, narrow=False)
        dw = self.empty(k) if need_dw else None
        need = self.lib.pylora_cuda_rms_norm_workspace(self.context, m, k) if need_dw else 0
        self.call(
            "rms_norm_backward", to.mat(dy), to.mat(x), to.at(w), to.at(rstd), to.mat(dx),
            add is not None, to.at(dw), *self.workspace(need),
        )  # fmt: skip
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
    ) -> Array:
        to, half = self.to, head_dim // 2
        x = to.read("x", x, None, None)
        cos, sin = (to.read("cos", a, None, half, narrow=False) for a in (cos, sin))
        at = self._index("position", position, x.shape[0], cos.shape[0])
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        self.call(
            "rope", to.mat(x), to.mat(cos), to.mat(sin), to.at(at, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, to.mat(y),
        )  # fmt: skip
        return y

    def _index(self, what: str, a: Any, n: int, limit: int) -> Array:
        """int64 [n] on the device, checked where it comes from the host."""
        on_device = isinstance(a, self.xp.ndarray)
        index = a if on_device else self.checked_index(what, a, limit)
        if index.dtype != np.int64:
            index = index.astype(np.int64)
        want(what, index, (n,))
        return self.xp.ascontiguousarray(index)

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        q, k, v = self._qkv(q, k, v, attn)
        o = self.empty(q.shape, F32 if dtype is None else dtype)
        lse = self.empty((q.shape[0], attn.heads))
        s, keep = self._seqs(seqs, q.shape[0], k.shape[0])
        self.attend(q, k, v, s, attn, o, lse)
        return o, lse

    def attend(
        self, q: Array, k: Array, v: Array, seqs: Any, attn: Attn, o: Array, lse: Array
    ) -> None:
        """`attention_forward` of checked arrays, with a pylora_cuda_seqs."""
        to, spec = self.to, self.to.attn(attn)
        need = self.lib.pylora_cuda_attention_workspace(
            self.context, seqs, spec, q.shape[0], k.shape[0]
        )
        self.call(
            "attention_forward", to.mat(q), to.mat(k), to.mat(v), seqs, spec, to.mat(o),
            to.mat(lse), *self.workspace(need),
        )  # fmt: skip

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
    ) -> tuple[Array, Array, Array]:
        to = self.to
        q, k, v = self._qkv(q, k, v, attn)
        do, o = to.read("do", do, *q.shape), to.read("o", o, *q.shape)
        lse = to.read("lse", lse, q.shape[0], attn.heads, narrow=False)
        kind = F32 if dtype is None else dtype
        s, keep = self._seqs(seqs, q.shape[0], k.shape[0])
        # Keys that no sequence uses keep a gradient of zero.
        whole = int(np.asarray(seqs.k_len).sum()) >= k.shape[0]
        make = self.empty if whole else self.zeros
        dq = (self.empty if int(seqs.q_start[-1]) >= q.shape[0] else self.zeros)(q.shape, kind)
        dk, dv = make(k.shape, kind), make(v.shape, kind)
        spec = to.attn(attn)
        need = self.lib.pylora_cuda_attention_workspace(
            self.context, s, spec, q.shape[0], k.shape[0]
        )
        self.call(
            "attention_backward", *(to.mat(a) for a in (do, q, k, v, o, lse)), s, spec,
            *(to.mat(a) for a in (dq, dk, dv)), *self.workspace(need),
        )  # fmt: skip
        return dq, dk, dv

    def _qkv(self, q: Array, k: Array, v: Array, attn: Attn) -> tuple[Array, Array, Array]:
        """Checked, and of one type: the narrowest that holds all of them is float32."""
        k = self.to.read("k", k, None, attn.kv_heads * attn.head_dim)
        q = self.to.read("q", q, None, attn.heads * attn.head_dim)
        v = self.to.read("v", v, *k.shape)
        if len({a.dtype for a in (q, k, v)}) > 1:
            q, k, v = (self.cast(a, F32) for a in (q, k, v))
        return q, k, v

    def _seqs(self, seqs: Seqs, q_rows: int, k_rows: int) -> tuple[Any, Any]:
        """(pylora_cuda_seqs, what must stay alive), copied to the device."""
        if isinstance(seqs, PlacedSeqs) and int(seqs.q_start[-1]) <= min(q_rows, k_rows):
            return seqs.struct, seqs
        check_seqs(seqs, q_rows, k_rows)
        parts = [np.asarray(a, np.int64) for a in (seqs.q_start, seqs.k_start, seqs.k_len)]
        ints = self.xp.asarray(np.concatenate(parts))
        return self.to.seqs(parts[1].size, ints, *longest(seqs)), ints

    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> Array:
        to = self.to
        gate = to.read("gate", gate, None, None)
        up = to.read("up", up, *gate.shape)
        y = self.empty(gate.shape, F32 if dtype is None else dtype)
        self.call("swiglu_forward", to.mat(gate), to.mat(up), to.mat(y))
        return y

    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[Array, Array]:
        to = self.to
        dy = to.read("dy", dy, None, None)
        gate, up = to.read("gate", gate, *dy.shape), to.read("up", up, *dy.shape)
        kind = F32 if dtype is None else dtype
        dgate, dup = self.empty(dy.shape, kind), self.empty(dy.shape, kind)
        self.call("swiglu_backward", *(to.mat(a) for a in (dy, gate, up, dgate, dup)))
        return dgate, dup

    def embedding_forward(self, ids: Array, W: Packed) -> Array:
        vocab, k = packed(W).shape
        ids = self._index("token id", ids, len(ids), vocab)
        y = self.empty((ids.size, k))
        self.call(
            "embedding_forward", self.to.at(ids, "int64_t *"), ids.size, W.struct, self.to.mat(y)
        )
        return y

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> Array:
        dy = self.to.read("dy", dy, None, None)
        ids = self._index("token id", ids, dy.shape[0], rows)
        dW = self.empty((rows, dy.shape[1]))
        at = self.to.at(ids, "int64_t *")
        self.call("embedding_backward", at, self.to.mat(dy), self.to.mat(dW))
        return dW

    def take_rows(self, x: Array, rows: Array) -> Array:
        """x[rows]; rows int64 on the device."""
        x = self.to.read("x", x, None, None)
        y = self.empty((rows.size, x.shape[1]), x.dtype)
        self.call("gather_rows", self.to.mat(x), self.to.at(rows, "int64_t *"), self.to.mat(y))
        return y

    def put_rows(self, y: Array, rows: Array, x: Array) -> None:
        """y[rows] = x, in y's type; rows int64 on the device, each once."""
        x = self.to.read("x", x, rows.size, y.shape[1])
        self.call("scatter_rows", self.to.mat(x), self.to.at(rows, "int64_t *"), self.to.mat(y))

    def llama(self, weights: LlamaWeights) -> LlamaOp:
        from pylora.backends.cuda_llama import CudaLlama

        return CudaLlama(self, weights)

    # ---- loss, optimizer, random numbers ------------------------------------------------------

    def _loss_inputs(self, logits: Array, labels: Array) -> tuple[Array, Any]:
        from pylora.reference import IGNORE

        logits = self.to.read("logits", logits, None, None)
        m, n = logits.shape
        if not isinstance(labels, self.xp.ndarray):
            labels = np.asarray(labels)
            self.checked_index("label", labels[labels != IGNORE], n)
            labels = self.index(labels)
        return logits, self._index("labels", labels, m, n)

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        logits, labels = self._loss_inputs(logits, labels)
        nll, lse = self.empty(logits.shape[0]), self.empty(logits.shape[0])
        to = self.to
        self.call(
            "cross_entropy_forward", to.mat(logits), to.at(labels, "int64_t *"), to.at(nll),
            to.at(lse),
        )  # fmt: skip
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array:
        to = self.to
        logits, labels = self._loss_inputs(logits, labels)
        m = logits.shape[0]
        lse = to.vector("lse", lse, m)
        weight = to.vector("weight", self.place(weight), m)
        d = logits if overwrite else self.empty(logits.shape)
        self.call(
            "cross_entropy_backward", to.mat(logits), to.at(labels, "int64_t *"), to.at(lse),
            to.at(weight), to.mat(d),
        )  # fmt: skip
        return d

    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[Array, Array, Array]:
        to = self.to
        logits, labels = self._loss_inputs(logits, labels)
        m = logits.shape[0]
        weight = to.vector("weight", self.place(weight), m)
        nll, lse = self.empty(m), self.empty(m)
        d = logits if overwrite else self.empty(logits.shape)
        self.call(
            "cross_entropy", to.mat(logits), to.at(labels, "int64_t *"), to.at(weight),
            to.at(nll), to.at(lse), to.mat(d),
        )  # fmt: skip
        return nll, lse, d

    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None:
        self.adamw_steps([(param, grad, m, v, o)])

    def adamw_steps(self, updates: Sequence[tuple[Array, Array, Array, Array, AdamW]]) -> None:
        """All arrays in one call; of the settings only lr and weight_decay may differ."""
        if not updates:
            return
        ffi, to, keep = self.ffi, self.to, []
        table = ffi.new("pylora_cuda_parameter[]", len(updates))
        for row, (param, grad, m, v, o) in zip(table, updates):
            grad = self.xp.ascontiguousarray(to.read("grad", grad, *param.shape, narrow=False))
            for name, a in (("param", param), ("m", m), ("v", v)):
                if a.dtype != F32 or not a.flags.c_contiguous or a.size != param.size:
                    raise ShapeError(
                        f"{name} is updated in place: it must be a contiguous float32 array of "
                        f"{param.size}"
                    )
            row.n, row.param, row.grad = param.size, to.at(param), to.at(grad)
            row.m, row.v, row.lr, row.weight_decay = to.at(m), to.at(v), o.lr, o.weight_decay
            keep.append(grad)
        o = updates[0][4]
        setting = ffi.new(
            "pylora_adamw *",
            (o.lr, o.beta1, o.beta2, o.eps, o.weight_decay, o.grad_scale, o.step),
        )
        self.call("adamw_step", len(updates), table, setting)

    def sum_squares(self, x: Array) -> float:
        return self.total_squares([x])

    def total_squares(self, arrays: Sequence[Array]) -> float:
        """All arrays in one call; waits for the result."""
        ffi, to, count = self.ffi, self.to, len(arrays)
        flat = [
            self.xp.ascontiguousarray(
                to.read("x", self.xp.ascontiguousarray(a).reshape(-1), None, narrow=False)
            )
            for a in arrays
        ]
        n = ffi.new("int64_t[]", [int(a.size) for a in flat])
        pointers = ffi.new("float *[]", [to.at(a) for a in flat])
        out = self.xp.empty(1, np.float64)
        need = self.lib.pylora_cuda_sum_squares_workspace(self.context, count, n)
        self.call("sum_squares", count, n, pointers, to.at(out, "double *"), *self.workspace(need))
        return float(out[0])

    def philox(self, seed: int, stream: int, first: int, n: int) -> Array:
        out = self.xp.empty(n, np.uint32)
        self.call("philox", seed, stream, first, n, self.to.at(out, "uint32_t *"))
        return out

    def dropout(self, x: Array, drop: Drop | None) -> Array:
        x = self.to.read("x", x, None, None)
        if drop is None or drop.p == 0:
            return x
        y = self.empty(x.shape, x.dtype)
        self.call("dropout", self.to.mat(x), self.to.drop(drop), self.to.mat(y))
        return y


def _device_asked_for() -> int | None:
    """PYLORA_CUDA_DEVICE, if it is set."""
    text = os.environ.get("PYLORA_CUDA_DEVICE")
    if not text:
        return None
    if not text.strip().isdecimal():
        raise BackendError(f"PYLORA_CUDA_DEVICE is {text!r}; it must be the number of a GPU, as 0")
    return int(text)


def packed(W: Any) -> Packed:
    if not isinstance(W, Packed):
        raise DtypeError(f"W must be a weight packed by this backend, got {type(W).__name__}")
    return W
