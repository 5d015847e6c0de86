"""What happens to each row by itself, on the GPU: norm, rotation, SwiGLU, embedding, and rows
taken out and put back.
"""

from __future__ import annotations

from typing import Any

from pylora.backends.cuda.base import Device
from pylora.backends.cuda.marshal import F32, Packed, packed
from pylora.errors import BackendError
from pylora.types import Array

_LAYOUTS = {"half": 0, "interleaved": 1}


class Rows(Device):
    """`rms_norm_*`, `rope`, `swiglu_*`, `embedding_*`, `take_rows` and `put_rows`."""

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
        to = self.to
        x = to.read("x", x, None, None)
        cos = to.read("cos", cos, None, None, narrow=False)
        sin = to.read("sin", sin, *cos.shape, narrow=False)
        at = self._index("position", position, x.shape[0], cos.shape[0])
        if layout not in _LAYOUTS:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(_LAYOUTS)}")
        y = self.empty(x.shape, F32 if dtype is None else dtype)
        self.call(
            "rope", to.mat(x), to.mat(cos), to.mat(sin), to.at(at, "int64_t *"), head_dim,
            _LAYOUTS[layout], inverse, to.mat(y),
        )  # fmt: skip
        return y

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
