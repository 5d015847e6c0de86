"""The gated feed-forward part of a block (SwiGLU, Shazeer 2020): down(silu(gate(x)) * up(x)).

LoRA may sit on any of the three projections. The product that `down` takes is not kept for
backward: it is computed again from gate and up where down has an adapter.
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
    projections_of,
)
from pylora.model.weights import Weights
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm, brief


@dataclass(eq=False)
class MLPCache:
    __repr__ = brief

    x: Array | None  # [m, hidden], only if gate or up has an adapter; may be taken out and put back
    gate: Array  # [m, intermediate]
    up: Array
    projections: tuple[LinearCache, LinearCache, LinearCache]
    rstd: Array | None  # [m], of the norm before


class MLP:
    """The feed-forward part of one layer; modules are named model.layers.N.mlp.*_proj."""

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

        def linear(name: str) -> LoRALinear:
            p = f"model.layers.{layer}.mlp.{name}"
            bias = weights(f"{p}.bias") if config.mlp_bias else None
            return LoRALinear(p, weights(f"{p}.weight"), bias, ops=ops, precision=precision)

        self.gate_proj, self.up_proj = linear("gate_proj"), linear("up_proj")
        self.down_proj = linear("down_proj")

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear, LoRALinear]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def input_lora(self) -> bool:
        """Whether gate or up has an adapter: then backward needs x."""
        return self.gate_proj.lora is not None or self.up_proj.lora is not None

    @property
    def trainable(self) -> bool:
        return self.input_lora or self.down_proj.lora is not None

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
        projections = projections_of(
            self.linears[:2], x, drop=drop, dtypes=(self.dtype, self.dtype)
        )
        results, product, rstd = self.ops.gate_up_forward(x, projections, norm, self.dtype)
        y, down_cache = self.down_proj.forward(product, residual=residual, drop=drop)
        down_cache.x = None  # computed again
        kept = x if self.input_lora and norm is None else None
        (gate, _), (up, _) = results
        gate_cache, up_cache = caches_of(projections, results)
        return y, MLPCache(kept, gate, up, (gate_cache, up_cache, down_cache), rstd)

    def backward(
        self, dy: Array, cache: MLPCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        *input_caches, down_cache = cache.projections
        need_inner = need_dx or self.input_lora
        if self.down_proj.lora is not None:
            down_cache.x = self.ops.swiglu_forward(cache.gate, cache.up, self.dtype)
        dz = self.down_proj.backward(dy, down_cache, grads, need_dx=need_inner, dtype=self.dtype)
        down_cache.x = None
        if not need_inner:
            return None
        dgate, dup = self.ops.swiglu_backward(dz, cache.gate, cache.up, self.dtype)
        del dz
        return backward_together(
            self.linears[:2], (dgate, dup), input_caches, cache.x, grads, need_dx=need_dx
        )
