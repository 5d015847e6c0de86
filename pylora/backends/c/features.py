"""What families have beside Llama's operations, on the C core: LayerNorm, activations, soft caps,
and the choice of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends._core import lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import F32, activation_of, at, check, mat, owned, read, read_any
from pylora.errors import ShapeError
from pylora.ops.mixture import Choice, routed
from pylora.types import Array


class FeatureOps(Core):
    """`layer_norm_*`, `activation_*`, `soft_cap_*` and `choose`."""

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
        number, x = activation_of(kind), read_any("x", x, None, None)
        up = None if up is None else read_any("up", up, *x.shape)
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        check(lib.pylora_activation_forward(number, mat(x), mat(up), mat(y)), "activation_forward")
        return y

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        number, x = activation_of(kind), read_any("x", x, None, None)
        dy, dup = read_any("dy", dy, *x.shape), None
        out = F32 if dtype is None else dtype
        dx = self.empty(x.shape, out)
        if up is not None:
            up, dup = read_any("up", up, *x.shape), self.empty(x.shape, out)
        status = lib.pylora_activation_backward(number, mat(dy), mat(x), mat(up), mat(dx), mat(dup))
        check(status, "activation_backward")
        return dx, dup

    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> Array:
        x = read("x", x, None, None)
        if multiplier == 1 and cap == 0:
            return x
        y: np.ndarray = self.empty(x.shape)
        check(lib.pylora_soft_cap_forward(mat(x), multiplier, cap, mat(y)), "soft_cap")
        return y

    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> Array:
        dy = read("dy", dy, None, None)
        if multiplier == 1 and cap == 0:
            return dy
        y, dx = read("y", y, *dy.shape), self.empty(dy.shape)
        status = lib.pylora_soft_cap_backward(mat(dy), mat(y), multiplier, cap, mat(dx))
        check(status, "soft_cap_backward")
        return dx

    def choose(self, logits: Array, top_k: int, normalize: bool) -> Choice:
        logits = read("logits", logits, None, None)
        m, n = logits.shape
        if not 1 <= top_k <= n:
            raise ShapeError(f"top_k must be from 1 to the number of experts {n}, got {top_k}")
        p, w = np.empty((m, n), np.float32), np.empty((m, top_k), np.float32)
        chosen = np.empty((m, top_k), np.int64)
        status = lib.pylora_choose(
            mat(logits), top_k, normalize, mat(p), at(chosen, "int64_t *"), mat(w)
        )
        check(status, "choose")
        return routed(p, chosen, w)
