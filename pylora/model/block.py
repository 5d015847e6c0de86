"""One layer of the model: x + attention(norm(x)), then the same with the feed-forward part.

Norms are before the sublayers (Llama), behind them (OLMo 2), or both (Gemma); or both sublayers
read the layer's input (a parallel residual). What they add may be multiplied (Granite).

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
from pylora.model.expert_lora import ExpertParameter
from pylora.model.experts import Experts, ExpertsCache
from pylora.model.linear import DropKey, Grads, LoRALinear
from pylora.model.mlp import MLP, MLPCache
from pylora.model.normed import through_norm, trains
from pylora.model.rope import Rope
from pylora.model.tensors import norm_roles
from pylora.model.weights import Weights, norm_of
from pylora.ops.llama import LayerWeights
from pylora.ops.protocol import Backend, Packed
from pylora.types import Array, Norm, Rotation, Seqs, brief


@dataclass(eq=False)
class After:
    """What backward of a norm behind a sublayer needs: its input and its rstd."""

    __repr__ = brief

    y: Array
    rstd: Array


@dataclass(eq=False)
class BlockCache:
    __repr__ = brief

    x: Array  # [m, hidden], input of the first norm
    attention: AttentionCache
    mid: Array  # [m, hidden], input of the second norm
    mlp: MLPCache | ExpertsCache
    after: tuple[After | None, After | None] = (None, None)


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
        self.path = path = f"{config.names.layer}.{layer}"
        self.ops = ops
        self.dtype: Any = ops.activation_dtype(precision)  # of what only feeds products
        self.parallel, self.multiplier = config.parallel, config.residual_multiplier
        roles = norm_roles(config, layer)

        def norm(role: str) -> Norm | None:
            if role not in roles:
                return None
            return norm_of(config, weights, f"{path}.{getattr(config.names, role)}", ops)

        self.input_norm = norm("input_norm")
        self.attention = Attention(config, layer, weights, rope, ops=ops, precision=precision)
        self.after_attention = norm("after_attention")
        self.mid_norm = norm("mid_norm")
        part = Experts if config.has_experts(layer) else MLP
        self.mlp: MLP | Experts = part(config, layer, weights, ops=ops, precision=precision)
        self.after_mlp = norm("after_mlp")

    def __repr__(self) -> str:
        n = sum(p.lora is not None for p in self.linears)
        return f"Block({self.path}: {len(self.linears)} modules, {n} with an adapter)"

    @property
    def linears(self) -> tuple[LoRALinear | ExpertParameter, ...]:
        """The modules that an adapter may sit on."""
        return *self.attention.linears, *self.mlp.linears

    @property
    def numbered(self) -> tuple[LoRALinear, ...]:
        """All modules in the order of `LayerWeights.W`."""
        return *self.attention.linears, *self.mlp.numbered

    @property
    def norms(self) -> dict[str, Norm]:
        """The norms of the residual stream and of what is added to it, by role."""
        found = {
            "input_norm": self.input_norm,
            "mid_norm": self.mid_norm,
            "after_attention": self.after_attention,
            "after_mlp": self.after_mlp,
        }
        return {role: norm for role, norm in found.items() if norm is not None}

    @property
    def router(self) -> Packed:
        """The packed router of a layer with experts; None without."""
        return self.mlp.mix.router if isinstance(self.mlp, Experts) else None

    @property
    def trainable(self) -> bool:
        norms = self.norms.values()
        return self.attention.trainable or self.mlp.trainable or any(map(trains, norms))

    def layer_weights(self) -> LayerWeights:
        """The weights as a backend's whole-model operation takes them."""
        attention = self.attention
        return LayerWeights(
            self.input_norm,
            self.mid_norm,
            tuple(p.W for p in self.numbered),
            tuple(p.bias for p in self.numbered),
            attention.q_norm,
            attention.k_norm,
            attention.shape.window,
            self.after_attention,
            self.after_mlp,
            attention.kind,
            attention.norms,
            self.mlp.mix if isinstance(self.mlp, Experts) else None,
            attention.own_scale,
        )

    # ---- forward ------------------------------------------------------------------------------

    def forward(
        self,
        x: Array,
        seqs: Seqs,
        *,
        drop: DropKey | None = None,
        position: np.ndarray | None = None,
        rotations: tuple[Rotation, ...] | None = None,
        past: Past | None = None,
    ) -> tuple[Array, BlockCache]:
        """x [m, hidden] -> y [m, hidden], and the cache for backward."""
        ops = self.ops
        plain = self.after_attention is None and self.multiplier == 1 and not self.parallel
        a, attention = self.attention.forward(
            self._in(x, self.input_norm), seqs, norm=self.input_norm,
            residual=x if plain else None, drop=drop, position=position, rotations=rotations,
            past=past,
        )  # fmt: skip
        mid, first = (a, None) if plain else self._join(x, a, self.after_attention)
        source, second = (x, self.mid_norm or self.input_norm) if self.parallel else (
            mid, self.mid_norm
        )  # fmt: skip
        plain = self.after_mlp is None and self.multiplier == 1
        y, mlp = self.mlp.forward(
            self._in(source, second), norm=second, residual=mid if plain else None, drop=drop
        )
        y, last = (y, None) if plain else self._join(mid, y, self.after_mlp)
        kept_x = ops.cast(x, self.dtype)
        kept_mid = kept_x if self.parallel else ops.cast(mid, self.dtype)
        return y, BlockCache(kept_x, attention, kept_mid, mlp, (first, last))

    def _in(self, x: Array, norm: Norm | None) -> Array:
        """What a sublayer is given: x, which it norms itself; in the narrow type without a norm."""
        return x if norm is not None else self.ops.cast(x, self.dtype)

    def _join(self, x: Array, y: Array, norm: Norm | None) -> tuple[Array, After | None]:
        """x + what a sublayer gave, normed and multiplied."""
        kept = None
        if norm is not None:
            raw = y
            y, rstd = self.ops.norm_forward(raw, norm)
            kept = After(raw, rstd)
        return x + self._scaled(y), kept

    def _scaled(self, y: Array) -> Array:
        return y if self.multiplier == 1 else y * y.dtype.type(self.multiplier)

    # ---- backward -----------------------------------------------------------------------------

    def _part(self, dy: Array, norm: Norm | None, after: After | None, grads: Grads) -> Array:
        """The gradient of what a sublayer gave, of that of the sum."""
        dy = self._scaled(dy)
        if norm is None or after is None:
            return dy
        return through_norm(self.ops, dy, after.y, norm, after.rstd, grads)

    def _through(
        self,
        dn: Array | None,
        x: Array,
        norm: Norm | None,
        rstd: Array | None,
        add: Array,
        grads: Grads,
    ) -> Array:
        """add + the gradient through the norm before a sublayer; `add` is given away."""
        if norm is None:
            return add if dn is None else add + dn
        return through_norm(self.ops, dn, x, norm, rstd, grads, add)

    def backward(
        self, dy: Array, cache: BlockCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden], given away -> dx [m, hidden]; None unless `need_dx`.

        Adapter gradients go into `grads`; nothing is computed below the lowest adapter.
        """
        c = cache
        second = (self.mid_norm or self.input_norm) if self.parallel else self.mid_norm
        need_in = need_dx or trains(self.input_norm)  # what comes out of attention
        need_mid = need_in or self.attention.trainable or trains(self.after_attention)
        need_dn = (need_dx if self.parallel else need_mid) or trains(second)
        part = self._part(dy, self.after_mlp, c.after[1], grads)
        if self.mlp.input_lora:
            c.mlp.x = self._normed(c.mid, second)
        dn = self.mlp.backward(part, c.mlp, grads, need_dx=need_dn)  # type: ignore[arg-type]
        c.mlp.x = None
        if self.parallel:
            return self._parallel_backward(dy, dn, cache, grads, need_dx)
        if not need_dn:
            return None
        dmid = self._through(dn, c.mid, second, c.mlp.rstd, dy, grads)
        if not need_mid:
            return None
        part = self._part(dmid, self.after_attention, c.after[0], grads)
        dn = self._attention_backward(part, c, grads, need_in)
        if not need_in:
            return None
        dx = self._through(dn, c.x, self.input_norm, c.attention.rstd, dmid, grads)
        return dx if need_dx else None

    def _normed(self, x: Array, norm: Norm | None) -> Array:
        return x if norm is None else self.ops.norm_forward(x, norm, self.dtype)[0]

    def _attention_backward(
        self, dy: Array, c: BlockCache, grads: Grads, need_dx: bool
    ) -> Array | None:
        if self.attention.input_lora:
            c.attention.x = self._normed(c.x, self.input_norm)
        dn = self.attention.backward(dy, c.attention, grads, need_dx=need_dx)
        c.attention.x = None
        return dn

    def _parallel_backward(
        self, dy: Array, dmlp: Array | None, c: BlockCache, grads: Grads, need_dx: bool
    ) -> Array | None:
        """Both sublayers read the same x, through one norm or through two."""
        part, second = self._scaled(dy), self.mid_norm or self.input_norm
        need_in = need_dx or trains(self.input_norm)
        dn = self._attention_backward(part, c, grads, need_in)
        dx = dy
        if need_in:
            dx = self._through(dn, c.x, self.input_norm, c.attention.rstd, dx, grads)
        if need_dx or trains(second):
            dx = self._through(dmlp, c.x, second, c.mlp.rstd, dx, grads)
        return dx if need_dx else None
