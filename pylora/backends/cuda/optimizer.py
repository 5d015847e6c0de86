"""AdamW's steps and the sums of squares that clip gradients, on the GPU: all arrays in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.backends.cuda.base import Device
from pylora.backends.cuda.marshal import F32
from pylora.errors import ShapeError
from pylora.types import AdamW, Array


class Optimizer(Device):
    """`adamw_step(s)`, `sum_squares` and `total_squares`."""

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
