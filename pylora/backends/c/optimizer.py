"""AdamW's step and the sum of squares that clips gradients, on the C core."""

from __future__ import annotations

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import at, check, read, writable
from pylora.types import AdamW, Array


class Optimizer(Core):
    """`adamw_step` and `sum_squares`."""

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
