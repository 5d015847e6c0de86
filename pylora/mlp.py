"""The gated feed-forward part of a block (SwiGLU, Shazeer 2020): down(silu(gate(x)) * up(x)).

LoRA may sit on any of the three projections. The product that `down` takes is not kept for
backward: it is computed again from gate and up where down has an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

from pylora.backends.protocol import Backend
from pylora.config import LlamaConfig
from pylora.linear import DropKey, Grads, LinearCache, LoRALinear
from pylora.types import Array
from pylora.weights import Weights


@dataclass(eq=False)
class MLPCache:
    x: Array | None  # [m, hidden], only if gate or up has an adapter; may be taken out and put back
    gate: Array  # [m, intermediate]
    up: Array
    projections: tuple[LinearCache, LinearCache, LinearCache]


class MLP:
    """The feed-forward part of one layer; modules are named model.layers.N.mlp.*_proj."""

    def __init__(self, config: LlamaConfig, layer: int, weights: Weights, *, ops: Backend) -> None:
        self.ops = ops

        def linear(name: str) -> LoRALinear:
            p = f"model.layers.{layer}.mlp.{name}"
            bias = weights(f"{p}.bias") if config.mlp_bias else None
            return LoRALinear(p, weights(f"{p}.weight"), bias, ops=ops)

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
        self, x: Array, *, residual: Array | None = None, drop: DropKey | None = None
    ) -> tuple[Array, MLPCache]:
        """x [m, hidden] -> residual + mlp(x) [m, hidden], and the cache for backward."""
        gate, gate_cache = self.gate_proj.forward(x, drop=drop)
        up, up_cache = self.up_proj.forward(x, drop=drop)
        product = self.ops.swiglu_forward(gate, up)
        y, down_cache = self.down_proj.forward(product, residual=residual, drop=drop)
        for cache in (gate_cache, up_cache, down_cache):
            cache.x = None  # kept once (x), or computed again (product)
        x = x if self.input_lora else None
        return y, MLPCache(x, gate, up, (gate_cache, up_cache, down_cache))

    def backward(
        self, dy: Array, cache: MLPCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        gate_cache, up_cache, down_cache = cache.projections
        need_inner = need_dx or self.input_lora
        if self.down_proj.lora is not None:
            down_cache.x = self.ops.swiglu_forward(cache.gate, cache.up)
        dz = self.down_proj.backward(dy, down_cache, grads, need_dx=need_inner)
        down_cache.x = None
        if not need_inner:
            return None
        dgate, dup = self.ops.swiglu_backward(dz, cache.gate, cache.up)
        del dz
        gate_cache.x = up_cache.x = cache.x
        dx = self.up_proj.backward(dup, up_cache, grads, need_dx=need_dx)
        del dup
        return self.gate_proj.backward(dgate, gate_cache, grads, add=dx, need_dx=need_dx)
