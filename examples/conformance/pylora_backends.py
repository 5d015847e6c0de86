"""pylora's own backends under the kit, in every precision of the weights.

PYTHONPATH=examples/conformance pylora conformance pylora_backends:C
PYTHONPATH=examples/conformance pylora conformance pylora_backends:CInt4
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from pylora_parts import GROUP, Parts

from pylora import backends
from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.numbers import random
from pylora.numbers.precision import BF16, QUANTIZED
from pylora.types import Drop, LoRA


class Padded:
    """A packed weight whose inputs were filled up with zeros to whole groups."""

    def __init__(self, packed: Any, k: int) -> None:
        self.packed, self.k = packed, k


class Padding:
    """A backend's operations for any number of inputs: zeros fill them up, and are cut off."""

    def __init__(self, ops: Any, precision: str) -> None:
        self._ops, self._precision = ops, precision
        self._group = GROUP if precision in QUANTIZED else 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _fill(self, a: Any) -> Any:
        """`a` [n, k] with zeros on the right."""
        more = -a.shape[1] % self._group
        return np.pad(a, ((0, 0), (0, more))) if more else a

    def _lora(self, lora: LoRA | None) -> LoRA | None:
        if lora is None:
            return None
        return replace(lora, A=self._fill(lora.A))

    def pack(self, W: Any) -> Padded:
        packed = self._ops.pack(self._fill(W), self._precision)
        return Padded(packed, W.shape[1])

    def row_norms(self, W: Padded, lora: LoRA) -> Any:
        return self._ops.row_norms(W.packed, self._lora(lora))

    def dora_forward(self, x: Any, W: Padded, bias: Any, lora: LoRA) -> Any:
        return self._ops.dora_forward(self._fill(x), W.packed, bias, self._lora(lora))

    def dora_backward(self, dy: Any, x: Any, h: Any, v: Any, W: Padded, lora: LoRA) -> Any:
        dx, dA, dB, dm = self._ops.dora_backward(
            dy, self._fill(x), h, v, W.packed, self._lora(lora)
        )
        return dx[:, : W.k], dA[:, : W.k], dB, dm

    def unpack(self, W: Padded) -> Any:
        return self._ops.unpack(W.packed)[:, : W.k]

    def lora_forward(
        self, x: Any, W: Padded, bias: Any, lora: Any, drop: Any = None, **more: Any
    ) -> Any:
        x, lora = self._fill(x), self._lora(lora)
        return self._ops.lora_forward(x, W.packed, bias, lora, drop, **more)

    def lora_backward(
        self, dy: Any, x: Any, h: Any, W: Padded, lora: Any, drop: Any = None, **more: Any
    ) -> Any:
        x, low = self._fill(x), self._lora(lora)
        dx, dA, dB = self._ops.lora_backward(dy, x, h, W.packed, low, drop, **more)
        return dx[:, : W.k], None if dA is None else dA[:, : W.k], dB


class Attached(CorrectModule):
    """A module of a stored weight, which nothing can be merged into."""

    merge = unmerge = None


class _Backend(Parts, Correct):
    """The methods that a backend computes; files, plan and initial values are not a backend's."""

    dtypes: tuple[str, ...] = ("float32",)

    def __init__(self, name: str, precision: str = "fp32") -> None:
        backend: Any = backends.get(name)
        self.ops: Any = Padding(backend, precision)
        # fp32x3 is fp32 where the machine has no matrix unit for bfloat16.
        self.precision = backend.computes(precision)
        self.name = f"pylora, backend {name}"
        if precision != "fp32":
            self.name += f", {precision}" + f" as {self.precision}" * (precision != self.precision)
            self.merge = self.unmerge = self.bias_merge = self.embedding_merge = None
            self.dora_norm = self.dora_forward = self.dora_backward = None
            self.dora_merge = self.dora_unmerge = None

    def _pack(self, W: Any) -> Any:
        if self.precision in (*QUANTIZED, "blocks") and np.abs(W).max(initial=0) > 65504:
            raise NotImplementedError("ggml's scales are float16, which this weight is beyond")
        return self.ops.pack(self.widen(W))

    def stored(self, W: Any) -> Any:
        return self.ops.unpack(self._pack(W)).astype(W.dtype)

    def _give(self, a: Any) -> Any:
        """An array as the backend takes it: bfloat16 by the name that pylora has for it."""
        return np.ascontiguousarray(a).view(np.uint16).view(BF16) if a.dtype.itemsize == 2 else a

    def _take(self, a: Any, dtype: Any) -> Any:
        """A result as the kit takes it."""
        return a.view(np.uint16).view(dtype) if a.dtype == BF16 else a.astype(dtype, copy=False)

    def _forward(self, x: Any, W: Any, bias: Any, lora: LoRA | None, drop: Any = None) -> Any:
        dtype = BF16 if x.dtype.itemsize == 2 else None
        if lora is not None:
            lora = LoRA(self.widen(lora.A), self.widen(lora.B), lora.scale, lora.dropout)
        packed, bias = self._pack(W), self.widen(bias)
        y, _ = self.ops.lora_forward(self._give(x), packed, bias, lora, drop, dtype=dtype)
        return self._take(y, x.dtype)

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        return self._forward(x, W, bias, LoRA(A, B, scale))

    def base(self, x: Any, W: Any, bias: Any = None) -> Any:
        return self._forward(x, W, bias, None)

    def _mask(self, p: float, seed: int) -> Any:
        stream = random.stream("dropout", "module", "0")
        return Drop(p, random.check_seed(seed), stream) if p else None

    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        drop = self._mask(p, seed)
        return self._forward(x, W, None, LoRA(A, B, scale, p), drop)

    def dropout_backward(
        self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        ops, lora = self.ops, LoRA(self.widen(A), self.widen(B), scale, p)
        drop = self._mask(p, seed)
        dtype = BF16 if x.dtype.itemsize == 2 else None
        packed, dy, given = self._pack(W), self._give(dy), self._give(x)
        _, h = ops.lora_forward(given, packed, None, lora, drop)
        grads = ops.lora_backward(dy, given, h, packed, lora, drop, dtype=dtype)
        return tuple(self._take(g, x.dtype) for g in grads)

    def forward_stacked(self, x: Any, W: Any, adapters: Any, bias: Any = None) -> Any:
        if not adapters:
            return self.base(x, W, bias)
        A = np.concatenate([A for A, _, _ in adapters])
        B = np.concatenate([self.widen(B) * np.float32(s) for _, B, s in adapters], axis=1)
        return self.forward(x, W, A, B, 1.0, bias)

    def module(self, W: Any, bias: Any = None) -> Any:
        return super().module(W, bias) if self.merge else Attached(self, W, bias)

    def pack(self, W: Any) -> Any:
        """Correct's methods take weights as the reference does; a backend's are packed."""
        return self._pack(W)


class NumPy(_Backend):
    def __init__(self) -> None:
        super().__init__("numpy")


class C(_Backend):
    dtypes = ("float32", "bfloat16")
    precision = "fp32"

    def __init__(self) -> None:
        super().__init__("c", self.precision)

    def set_num_threads(self, n: int) -> None:
        self.ops.set_num_threads(n)

    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        """One pass over W for all rows, sorted by adapter: pylora_linear_forward's segments."""
        from pylora.backends._core import ffi, lib
        from pylora.backends.c.marshal import at, check, lora_struct, mat

        rows = np.asarray(rows)
        if rows.size and not (-1 <= rows.min() and rows.max() < len(adapters)):
            raise IndexError(f"rows name adapters -1 .. {rows.max()} of {len(adapters)}")
        packed, ops = self._pack(W).packed, self.ops
        (d, k), code = packed.shape, packed.struct.dtype
        keep: list[Any] = []

        def resident(lora: LoRA) -> Any:
            """The adapter packed once, as it stays while it answers."""
            low, *alive = lora_struct(lora, None, d, k)
            size = lib.pylora_lora_pack_bytes(code, d, k, lora.rank)
            buffer = np.empty(size + 64, np.uint8)
            buffer = buffer[-buffer.ctypes.data % 64 :]
            check(lib.pylora_lora_pack(code, d, k, low, at(buffer, "void *")), "lora_pack")
            low.packed = at(buffer, "void *")
            keep.extend((low, alive, buffer))
            return low

        dtype, x, bias = x.dtype, self.widen(x), self.widen(bias)  # the sums are float32's
        wide = [(self.widen(A), self.widen(B), scale) for A, B, scale in adapters]
        pool = [resident(ops._lora(LoRA(*triple))) for triple in wide]
        order = np.argsort(rows, kind="stable")
        used, first = np.unique(rows[order], return_index=True)
        start = np.append(first, len(rows)).astype(np.int64)
        chosen = ffi.new("pylora_lora *[]", [pool[i] if i >= 0 else ffi.NULL for i in used])
        given = np.ascontiguousarray(ops._fill(x)[order])
        sorted_y, y = np.empty((len(rows), d), np.float32), np.empty((len(rows), d), np.float32)
        linear = ffi.new("pylora_linear *")
        linear.W, linear.lora, linear.y = packed.struct, chosen, (out := mat(sorted_y))
        if bias is not None:
            bias = np.ascontiguousarray(bias)
            linear.bias = at(bias)
        rank = max([A.shape[0] for A, _, _ in adapters], default=0)
        size = lib.pylora_linear_workspace(len(rows), 1, d, k, rank)
        ws = np.empty(size + 64, np.uint8)
        ws = ws[-ws.ctypes.data % 64 :]
        status = lib.pylora_linear_forward(
            mat(given), 1, linear, len(used), at(start, "int64_t *"), at(ws, "void *"), ws.size
        )
        check(status, "linear_forward")
        del out
        keep.clear()
        y[order] = sorted_y
        return y.astype(dtype, copy=False)


class CFp32x3(C):
    precision = "fp32x3"


class CBf16(C):
    precision = "bf16"


class CInt8(C):
    precision = "int8"


class CInt4(C):
    precision = "int4"


class CInt8a8(C):
    precision = "int8a8"


class CInt4a8(C):
    precision = "int4a8"


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    reports = [run(each) for each in (NumPy, C, CFp32x3, CBf16, CInt8, CInt4, CInt8a8, CInt4a8)]
    print(*map(text, reports))
    assert all(report.ok for report in reports)
