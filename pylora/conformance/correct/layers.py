"""The correct transformer block of families that order its parts otherwise than Llama does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.conformance.correct.attending import Adapters, Attending, Weights, check_shape
from pylora.conformance.protocol import AttentionShape, LayerOrder
from pylora.types import Array, Seqs


class Layers(Attending):
    """The method layer, in parts that each do one thing."""

    def layer(
        self,
        x: Array,
        weights: Weights,
        adapters: Adapters,
        shape: AttentionShape,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        check_shape(shape, x.shape[0])
        wide = self.widen(x)

        def attention(normed: Array) -> Array:
            return self.ordered_attention(normed, weights, adapters, shape, eps, order)

        def forward(normed: Array) -> Array:
            gate, _ = self._project("gate_proj", normed, weights, adapters)
            up, _ = self._project("up_proj", normed, weights, adapters)
            return self._project("down_proj", self.ops.swiglu_forward(gate, up), weights, adapters)[
                0
            ]

        first = self.added(wide, attention, ("norm1", "norm3"), weights, eps, order)
        if order.parallel:
            names = ("norm2" if "norm2" in weights else "norm1", "norm4")
            return np.asarray(
                wide + first + self.added(wide, forward, names, weights, eps, order)
            ).astype(x.dtype)
        x1 = wide + first
        second = self.added(x1, forward, ("norm2", "norm4"), weights, eps, order)
        return np.asarray(x1 + second).astype(x.dtype)

    def added(
        self,
        x: Array,
        sublayer: Callable[[Array], Array],
        norms: tuple[str, str],
        weights: Weights,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        """What a sublayer adds to x: its norms before it and behind it, and the multiplier last."""
        before, behind = norms
        y = x if order.norms == "behind" else self.normed(x, weights[before], eps, order)
        y = sublayer(y)
        if order.norms != "before":
            y = self.normed(y, weights[behind], eps, order)
        return y if order.multiplier == 1 else y * y.dtype.type(order.multiplier)

    def normed(self, x: Array, w: Array, eps: float, order: LayerOrder) -> Array:
        """RMSNorm by w, or by 1 + w: the sum is made once, in the width that is computed in."""
        factor = self.widen(w)
        if order.plus_one:
            factor = factor + factor.dtype.type(1)
        y: Array = self.ops.rms_norm_forward(np.ascontiguousarray(x), factor, eps)[0]
        return y

    def ordered_attention(
        self,
        x: Array,
        weights: Weights,
        adapters: Adapters,
        shape: AttentionShape,
        eps: float,
        order: LayerOrder,
    ) -> Array:
        position = self._positions(shape)
        q, k, v = (
            self._project(name, x, weights, adapters)[0] for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (
            self._turned(self.of_heads(a, weights[n], shape, eps, order), position, shape)
            if order.qk_norm
            else self._turned(a, position, shape)
            for a, n in ((q, "q_norm"), (k, "k_norm"))
        )
        o, _ = self.ops.attention_forward(q, k, v, Seqs.of(shape.lengths), self._attn(shape))
        return self._project("o_proj", o, weights, adapters)[0]

    def of_heads(
        self, a: Array, w: Array, shape: AttentionShape, eps: float, order: LayerOrder
    ) -> Array:
        """The norm of each head, or of the whole row, of q or of k."""
        rows = a.reshape(-1, shape.head_dim) if order.qk_norm == "head" else a
        return self.normed(rows, w, eps, order).reshape(a.shape)
