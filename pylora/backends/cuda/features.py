"""What families have beside Llama's operations, on the GPU: LayerNorm, activations, soft caps."""

from __future__ import annotations

from typing import Any

from pylora.backends.cuda.base import Device
from pylora.backends.cuda.marshal import F32
from pylora.errors import BackendError
from pylora.ops.features import ACTIVATIONS
from pylora.types import Array


def _number(kind: str) -> int:
    if kind not in ACTIVATIONS:
        raise BackendError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.index(kind)  # as in pylora.h


class FeatureOps(Device):
    """`layer_norm_*`, `activation_*` and `soft_cap_*`."""

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        to = self.to
        x = to.read("x", x, None, None)
        m, k = x.shape
        w, b = to.vector("w", w, k), None if b is None else to.vector("b", b, k)
        y, rstd = self.empty((m, k), F32 if dtype is None else dtype), self.empty(m)
        self.call("layer_norm_forward", to.mat(x), to.at(w), to.at(b), eps, to.mat(y), to.at(rstd))
        return y, rstd

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> Array:
        to = self.to
        x = to.read("x", x, None, None)
        m, k = x.shape
        dy, w, rstd = to.read("dy", dy, m, k), to.vector("w", w, k), to.vector("rstd", rstd, m)
        dx = self.empty((m, k)) if add is None else to.read("add", add, m, k, narrow=False)
        self.call(
            "layer_norm_backward", to.mat(dy), to.mat(x), to.at(w), to.at(rstd), to.mat(dx),
            add is not None,
        )  # fmt: skip
        return dx

    def activation_forward(self, x: Array, up: Array | None, kind: str, dtype: Any = None) -> Array:
        to, number = self.to, _number(kind)
        x = to.read("x", x, None, None)
        up = None if up is None else to.read("up", up, *x.shape)
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        self.call("activation_forward", number, to.mat(x), to.mat(up), to.mat(y))
        return y

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[Array, Array | None]:
        to, number = self.to, _number(kind)
        x = to.read("x", x, None, None)
        dy, out = to.read("dy", dy, *x.shape), F32 if dtype is None else dtype
        dx, dup = self.empty(x.shape, out), None
        if up is not None:
            up, dup = to.read("up", up, *x.shape), self.empty(x.shape, out)
        mats = [to.mat(a) for a in (dy, x, up, dx, dup)]
        self.call("activation_backward", number, *mats)
        return dx, dup

    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> Array:
        x = self.to.read("x", x, None, None)
        if multiplier == 1 and cap == 0:
            return x
        y = self.empty(x.shape)
        self.call("soft_cap_forward", self.to.mat(x), multiplier, cap, self.to.mat(y))
        return y

    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> Array:
        dy = self.to.read("dy", dy, None, None)
        if multiplier == 1 and cap == 0:
            return dy
        y, dx = self.to.read("y", y, *dy.shape), self.empty(dy.shape)
        mats = [self.to.mat(a) for a in (dy, y)]
        self.call("soft_cap_backward", *mats, multiplier, cap, self.to.mat(dx))
        return dx
