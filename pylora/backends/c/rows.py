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
    mat,
    owned,
    read,
    read_any,
    shape_of,
)
from pylora.errors import BackendError
from pylora.ops.features import ACTIVATIONS
from pylora.types import Array

_LAYOUTS = {"half": 0, "interleaved": 1}


def _kind(activation: str) -> int:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise BackendError(f"activation {activation!r} is none of {known}")
    return ACTIVATIONS.index(activation)


class Rows(Core):
    """Norms, `rope`, activations, caps and `embedding_*`."""

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
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        status = lib.pylora_rope(
            mat(x), mat(cos), mat(sin), at(position, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, mat(y),
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

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        x = read_any("x", x, None, None)
        m, k = x.shape
        w = np.ascontiguousarray(read("w", w, k))
        b = None if b is None else np.ascontiguousarray(read("b", b, k))
        y, rstd = self.empty((m, k), F32 if dtype is None else dtype), np.empty(m, np.float32)
        status = lib.pylora_layer_norm_forward(mat(x), at(w), at(b), eps, mat(y), at(rstd))
        check(status, "layer_norm")
        return y, rstd

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> np.ndarray:
        x = read_any("x", x, None, None)
        m, k = x.shape
        dy, w = read_any("dy", dy, m, k), np.ascontiguousarray(read("w", w, k))
        rstd = np.ascontiguousarray(read("rstd", rstd, m))
        dx = self.empty((m, k)) if add is None else owned("add", add, m, k)
        status = lib.pylora_layer_norm_backward(
            mat(dy), mat(x), at(w), at(rstd), mat(dx), add is not None
        )
        check(status, "layer_norm_backward")
        return dx

    def activation_forward(
        self, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> np.ndarray:
        x = read_any("x", x, None, None)
        up = None if up is None else read_any("up", up, *x.shape)
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        check(lib.pylora_activation_forward(_kind(kind), mat(x), mat(up), mat(y)), "activation")
        return y

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        dy = read_any("dy", dy, None, None)
        x, to = read_any("x", x, *dy.shape), F32 if dtype is None else dtype
        up = None if up is None else read_any("up", up, *dy.shape)
        dx, dup = self.empty(dy.shape, to), None if up is None else self.empty(dy.shape, to)
        status = lib.pylora_activation_backward(
            _kind(kind), mat(dy), mat(x), mat(up), mat(dx), mat(dup)
        )
        check(status, "activation_backward")
        return dx, dup

    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> np.ndarray:
        x = read("x", x, None, None)
        if multiplier == 1 and not cap:
            return np.asarray(x)
        y = self.empty(x.shape)
        check(lib.pylora_soft_cap_forward(mat(x), multiplier, cap, mat(y)), "soft_cap")
        return y

    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> np.ndarray:
        dy = read("dy", dy, None, None)
        y, dx = read("y", y, *dy.shape), self.empty(dy.shape)
        status = lib.pylora_soft_cap_backward(mat(dy), mat(y), multiplier, cap, mat(dx))
        check(status, "soft_cap_backward")
        return dx

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
