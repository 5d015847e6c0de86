"""What happens to each row by itself, on the C core: norm, rotation, SwiGLU, embedding."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends._core import lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import (
    F32,
    Packed,
    at,
    check,
    ints,
    layout_of,
    mat,
    owned,
    read,
    read_any,
    shape_of,
)
from pylora.types import Array


class Rows(Core):
    """`rms_norm_*`, `rope`, `swiglu_*` and `embedding_*`."""

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
        cos = read("cos", cos, None, None)
        sin = read("sin", sin, *cos.shape)
        position = ints("position", position, x.shape[0])
        kind = layout_of(layout)
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        status = lib.pylora_rope(
            mat(x), mat(cos), mat(sin), at(position, "int64_t *"), head_dim,
            kind, inverse, mat(y),
        )  # fmt: skip
        check(status, "rope")
        return y

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
