"""One layer of the model: x + attention(norm(x)), then the same with the feed-forward part.

For backward it keeps the residual stream at the input of each norm, in the dtype of what feeds
products; the norms' outputs are computed again from it where an adapter needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import expect
from pylora.model.attention import Attention, AttentionCache, Past
from pylora.model.config import LlamaConfig
from pylora.model.linear import DropKey, Grads, LoRALinear
from pylora.model.mlp import MLP, MLPCache
from pylora.model.rope import Rope
from pylora.model.weights import Weights, vector
from pylora.ops.protocol import Backend
from pylora.types import Array, Norm, Seqs, brief


@dataclass(eq=False)
class BlockCache:
    __repr__ = brief

    x: Array  # [m, hidden], input of the first norm
    attention: AttentionCache
    mid: Array  # [m, hidden], input of the second norm
    mlp: MLPCache


class Block:
    """Layer `layer` of `config`. Tensors are asked of `weights` one at a time and packed."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        weights: Weights,
        rope: Rope | None = None,
        *,
        ops: Backend,
        precision: str = "fp32",
    ) -> None:
        expect("model configuration", config, "Block(config, layer, weights)")
        self.path = path = f"model.layers.{layer}"
        self.ops, self.eps = ops, config.rms_norm_eps
        self.dtype: Any = ops.activation_dtype(precision)  # of what only feeds products
        self.input_norm = vector(weights, f"{path}.input_layernorm.weight", ops)
        self.attention = Attention(config, layer, weights, rope, ops=ops, precision=precision)
        self.mid_norm = vector(weights, f"{path}.post_attention_layernorm.weight", ops)
        self.mlp = MLP(config, layer, weights, ops=ops, precision=precision)

    def __repr__(self) -> str:
        n = sum(p.lora is not None for p in self.linears)
        return f"Block({self.path}: {len(self.linears)} modules, {n} with an adapter)"

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        """The modules that an adapter may sit on."""
        return *self.attention.linears, *self.mlp.linears

    @property
    def trainable(self) -> bool:
        return self.attention.trainable or self.mlp.trainable

    def forward(
        self,
        x: Array,
        seqs: Seqs,
        *,
        drop: DropKey | None = None,
        position: np.ndarray | None = None,
        past: Past | None = None,
    ) -> tuple[Array, BlockCache]:
        """x [m, hidden] -> y [m, hidden], and the cache for backward."""
        ops = self.ops
        first, second = Norm(self.input_norm, self.eps), Norm(self.mid_norm, self.eps)
        mid, attention = self.attention.forward(
            x, seqs, norm=first, residual=x, drop=drop, position=position, past=past
        )
        y, mlp = self.mlp.forward(mid, norm=second, residual=mid, drop=drop)
        kept = ops.cast(x, self.dtype), ops.cast(mid, self.dtype)
        return y, BlockCache(kept[0], attention, kept[1], mlp)

    def backward(
        self, dy: Array, cache: BlockCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden], given away -> dx [m, hidden]; None unless `need_dx`.

        Adapter gradients go into `grads`; nothing is computed below the lowest adapter.
        """
        ops, c = self.ops, cache
        need_mid = need_dx or self.attention.trainable
        if self.mlp.input_lora:
            c.mlp.x, _ = ops.rms_norm_forward(c.mid, self.mid_norm, self.eps, self.dtype)
        dn = self.mlp.backward(dy, c.mlp, grads, need_dx=need_mid)
        c.mlp.x = None
        if not need_mid:
            return None
        dmid, _ = ops.rms_norm_backward(dn, c.mid, self.mid_norm, c.mlp.rstd, add=dy)
        if self.attention.input_lora:
            c.attention.x, _ = ops.rms_norm_forward(c.x, self.input_norm, self.eps, self.dtype)
        dn = self.attention.backward(dmid, c.attention, grads, need_dx=need_dx)
        c.attention.x = None
        if not need_dx:
            return None
        dx, _ = ops.rms_norm_backward(dn, c.x, self.input_norm, c.attention.rstd, add=dmid)
        return dx
