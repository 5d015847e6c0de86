"""The feed-forward part of a block: gated, down(act(gate(x)) * up(x)) (Shazeer 2020), or plain,
down(act(up(x))).

LoRA may sit on any of the projections; gate and up may be one, whose output is split. The product
that `down` takes is not kept for backward: it is computed again where down has an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pylora.model.config import LlamaConfig
from pylora.model.linear import (
    DropKey,
    Grads,
    LinearCache,
    LoRALinear,
    backward_together,
    caches_of,
    forward_together,
    projections_of,
)
from pylora.model.weights import Weights
from pylora.ops.dora import rescaled
from pylora.ops.fused import split_gate_up
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm, brief


@dataclass(eq=False)
class MLPCache:
    __repr__ = brief

    x: Array | None  # [m, hidden], only where `input_lora`; may be taken out and put back
    gate: Array  # [m, intermediate]; without a gate it is up, and `up` is None
    up: Array | None
    projections: tuple[LinearCache, ...]
    rstd: Array | None  # [m], of the norm before


class MLP:
    """The feed-forward part of one layer; modules are named as the family names them."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        weights: Weights,
        *,
        ops: Backend,
        precision: str = "fp32",
    ) -> None:
        self.ops = ops
        self.dtype: Any = ops.activation_dtype(precision)  # of what only feeds products

        self.activation = config.activation
        names, at = config.names, f"{config.names.layer}.{layer}"

        def linear(role: str) -> LoRALinear:
            p = f"{at}.{getattr(names, role)}"
            bias = weights(f"{p}.bias") if config.mlp_bias else None
            return LoRALinear(p, weights(f"{p}.weight"), bias, ops=ops, precision=precision)

        *inputs, last = config.features.mlp_modules
        self.inputs = tuple(linear(role) for role in inputs)  # gate and up, their one, or up
        self.fused = config.fused_gate_up
        self.down_proj = linear(last)

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        return *self.inputs, self.down_proj

    @property
    def numbered(self) -> tuple[LoRALinear, ...]:
        """The same: all of them have numbers in `LayerWeights.W`."""
        return self.linears

    @property
    def input_lora(self) -> bool:
        """Whether gate or up has an adapter, or is trained itself: then backward needs x."""
        return any(p.trained for p in self.inputs)

    @property
    def trainable(self) -> bool:
        return self.input_lora or self.down_proj.trained

    def _project(
        self, x: Array, norm: Norm | None, drop: DropKey | None
    ) -> tuple[Array, Array | None, Array, list[LinearCache], Array | None]:
        """gate, up, their product, the modules' caches and the norm's rstd."""
        ops, dtype, rstd = self.ops, self.dtype, None
        projections = projections_of(
            self.inputs, x, drop=drop, dtypes=(self.dtype,) * len(self.inputs)
        )
        up: Array | None
        if len(self.inputs) == 2 and not rescaled(projections):
            results, product, rstd = ops.gate_up_forward(
                x, projections, norm, dtype, self.activation
            )
            gate, up = results[0][0], results[1][0]
            return gate, up, product, caches_of(projections, results), rstd
        if norm is not None:
            x, rstd = ops.norm_forward(x, norm, dtype)
        ys, caches = forward_together(ops, x, projections)
        gate, up = split_gate_up(ys[0]) if self.fused else (ys[0], None)
        if len(ys) == 2:
            up = ys[1]
        product = ops.activation_forward(gate, up, self.activation, dtype)
        return gate, up, product, caches, rstd

    def forward(
        self,
        x: Array,
        *,
        norm: Norm | None = None,
        residual: Array | None = None,
        drop: DropKey | None = None,
    ) -> tuple[Array, MLPCache]:
        """x [m, hidden] -> residual + mlp(x) [m, hidden], and the cache for backward.

        With `norm` it is the mlp of the normed x, and the cache's x has to be put there."""
        gate, up, product, caches, rstd = self._project(x, norm, drop)
        y, down_cache = self.down_proj.forward(product, residual=residual, drop=drop)
        down_cache.x = None  # computed again
        kept = x if self.input_lora and norm is None else None
        return y, MLPCache(kept, gate, up, (*caches, down_cache), rstd)

    def backward(
        self, dy: Array, cache: MLPCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        *input_caches, down_cache = cache.projections
        gate, up, kind = cache.gate, cache.up, self.activation
        need_inner = need_dx or self.input_lora
        if self.down_proj.trained:
            down_cache.x = self.ops.activation_forward(gate, up, kind, self.dtype)
        dz = self.down_proj.backward(dy, down_cache, grads, need_dx=need_inner, dtype=self.dtype)
        down_cache.x = None
        if not need_inner or dz is None:
            return None
        dgate, dup = self.ops.activation_backward(dz, gate, up, kind, self.dtype)
        del dz
        dys = [dgate] if dup is None else [dgate, dup]
        if self.fused:
            dys = [self.ops.xp.concatenate(dys, axis=1)]
        return backward_together(self.inputs, dys, input_caches, cache.x, grads, need_dx=need_dx)
