"""Causal grouped-query attention with LoRA on any of its q, k, v and o projections.

q, k and v are projected (by three modules, or by one whose output is split), normed where the model
says so (ops/heads.py), rotated by position (RoPE,
where the layer has it), attended (softmax over the keys a query may see), and projected back. With
a KV cache the keys and values of earlier tokens come from it; that way has no backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import expect
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
from pylora.model.normed import through_heads, trains
from pylora.model.rope import Rope
from pylora.model.weights import Weights, head_norm
from pylora.ops.dora import rescaled
from pylora.ops.fused import join_qkv, split_qkv
from pylora.ops.heads import norm_heads
from pylora.ops.protocol import Backend
from pylora.types import Array, Attn, Norm, Rotation, Seqs, brief


def positions(seqs: Seqs) -> np.ndarray:
    """The position of each query row in its sequence, int64 [m]; the last query is the last key."""
    n = np.diff(seqs.q_start)
    first = seqs.k_len - n - seqs.q_start[:-1]
    out: np.ndarray = np.arange(int(seqs.q_start[-1]), dtype=np.int64)
    out += np.repeat(first, n)
    return out


@dataclass(eq=False)
class Past:
    """A layer's part of a KV cache: k, v [rows, kv_heads * D], and the rows of the new tokens."""

    __repr__ = brief

    k: Array
    v: Array
    rows: Array


@dataclass(eq=False)
class AttentionCache:
    """What backward needs. `q` and `k` are rotated; where heads are normed they are as projected,
    and norm and rotation are done again."""

    __repr__ = brief

    x: Array | None  # [m, hidden], only where `input_lora`; may be taken out and put back
    q: Array
    k: Array
    v: Array
    o: Array
    lse: Array
    seqs: Seqs
    rotation: Rotation | None
    projections: tuple[LinearCache, ...]  # q, k and v, or their one; o
    rstd: Array | None  # [m], of the norm before


class Attention:
    """The attention of one layer of `config`; modules are named as the family names them."""

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
        """`weights` gives each tensor by its Hugging Face name; each is packed and let go."""
        expect("model configuration", config, "Attention(config, layer, weights)")
        names, at = config.names, f"{config.names.layer}.{layer}"
        self.path = f"{at}.{names.o.rpartition('.')[0]}"
        self.ops = ops
        self.dtype: Any = ops.activation_dtype(precision)  # of what only feeds products

        def linear(role: str, biased: bool) -> LoRALinear:
            p = f"{at}.{getattr(names, role)}"
            bias = weights(f"{p}.bias") if biased else None
            return LoRALinear(p, weights(f"{p}.weight"), bias, ops=ops, precision=precision)

        *inputs, _ = config.features.attention_modules
        self.inputs = tuple(linear(role, config.attention_bias) for role in inputs)
        self.o_proj = linear("o", config.attention_out_bias)
        self.fused = config.fused_qkv
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.norms = config.qk_norm_of  # how the two are meant: ops.heads.HEADS
        if config.qk_norm:
            self.q_norm = head_norm(config, weights, f"{at}.{names.q_norm}", ops)
            self.k_norm = head_norm(config, weights, f"{at}.{names.k_norm}", ops)
        self.shape = Attn(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.scale(layer),
            config.window(layer),
            config.attention_softcap,
        )
        # What the whole model's scale is not: 0 where it is.
        self.own_scale = 0.0 if config.attention_scales is None else config.scale(layer)
        self.kind = config.rope_of(layer)  # which rotation; -1: none
        self.rope = rope if rope is not None else Rope(config, ops=ops)

    def __repr__(self) -> str:
        s, n = self.shape, sum(p.lora is not None for p in self.linears)
        return (
            f"Attention({self.path}: {s.heads} heads of {s.head_dim}, {s.kv_heads} of keys, "
            f"{n} modules with an adapter)"
        )

    @property
    def linears(self) -> tuple[LoRALinear, ...]:
        return *self.inputs, self.o_proj

    @property
    def input_lora(self) -> bool:
        """Whether q, k or v has an adapter, or is trained itself: then backward needs x."""
        return any(p.trained for p in self.inputs)

    @property
    def trainable(self) -> bool:
        return self.input_lora or self.o_proj.trained or self._norms_trained

    @property
    def _norms_trained(self) -> bool:
        return trains(self.q_norm) or trains(self.k_norm)

    def _turn(
        self, x: Array, norm: Norm | None, rotation: Rotation | None
    ) -> tuple[Array, Array | None]:
        """Projected q or k, normed and rotated; and the norm's rstd."""
        rstd, ops, D = None, self.ops, self.shape.head_dim
        if norm is not None:
            x, rstd = norm_heads(ops, x, norm, D, self.norms)
        if rotation is None:
            return ops.cast(x, self.dtype), rstd
        r = rotation
        return ops.rope(x, r.cos, r.sin, r.position, D, r.layout, dtype=self.dtype), rstd

    def _turn_back(
        self,
        dx: Array,
        raw: Array,
        rstd: Array | None,
        norm: Norm | None,
        rotation: Rotation | None,
        grads: Grads,
    ) -> Array:
        """The backward of `_turn`; `raw` is its input, of which only a norm has need."""
        ops, D, r = self.ops, self.shape.head_dim, rotation
        dtype = self.dtype if norm is None else None
        if r is not None:
            dx = ops.rope(dx, r.cos, r.sin, r.position, D, r.layout, inverse=True, dtype=dtype)
        if norm is None or rstd is None:
            return dx
        return through_heads(ops, dx, raw, norm, rstd, D, self.norms, grads)

    def _project(
        self, x: Array, norm: Norm | None, rotation: Rotation | None, drop: DropKey | None
    ) -> tuple[list[Array], list[LinearCache], Array | None, bool]:
        """q, k and v of the normed x, the modules' caches, the norm's rstd, and whether q and k
        are rotated already."""
        if self.fused:
            [p] = projections_of(self.inputs, x, drop=drop, dtypes=(None,))
            rstd = None
            if norm is not None:
                x, rstd = self.ops.norm_forward(x, norm, self.dtype)
            [y], caches = forward_together(self.ops, x, [p])
            q, k, v = split_qkv(y, self.fused, self.shape)
            return [q, k, self.ops.cast(v, self.dtype)], caches, rstd, False
        # q and k are rounded once they are rotated, so not here.
        projections = projections_of(self.inputs, x, drop=drop, dtypes=(None, None, self.dtype))
        if rescaled(projections):
            rstd = None
            if norm is not None:
                x, rstd = self.ops.norm_forward(x, norm, self.dtype)
            ys, caches = forward_together(self.ops, x, projections)
            return ys, caches, rstd, False
        early = rotation if self.q_norm is None else None  # nothing comes in between
        results, rstd = self.ops.qkv_forward(x, projections, norm, early, self.dtype)
        caches = caches_of(projections, results)
        return [y for y, _ in results], caches, rstd, early is not None

    def forward(
        self,
        x: Array,
        seqs: Seqs,
        *,
        norm: Norm | None = None,
        residual: Array | None = None,
        drop: DropKey | None = None,
        position: np.ndarray | None = None,
        rotations: tuple[Rotation, ...] | None = None,
        past: Past | None = None,
    ) -> tuple[Array, AttentionCache]:
        """x [m, hidden] -> residual + attention(x) [m, hidden], and the cache for backward.

        With `norm` it is the attention of the normed x, and the cache's x has to be put there.
        `position` [m] defaults to what `seqs` says, `rotations` to those of the positions. With
        `past` the new keys and values are stored there and the keys that `seqs` names are read from
        there.
        """
        rotation = None
        if self.kind >= 0:
            if rotations is None:
                position = positions(seqs) if position is None else position
                rotations = self.rope.rotations(seqs, position)
            rotation = rotations[self.kind]
        (q, k, v), caches, rstd, turned = self._project(x, norm, rotation, drop)
        kept = q, k
        if not turned:
            q, _ = self._turn(q, self.q_norm, rotation)
            k, _ = self._turn(k, self.k_norm, rotation)
            if self.q_norm is None:
                kept = q, k
        keys, values = k, v
        if past is not None:
            rows = self.ops.xp.asarray(past.rows)
            past.k[rows], past.v[rows] = k, v
            keys, values = past.k, past.v
        o, lse = self.ops.attention_forward(q, keys, values, seqs, self.shape, self.dtype)
        y, o_cache = self.o_proj.forward(o, residual=residual, drop=drop)
        o_cache.x = None  # o is kept below
        kept_x = x if self.input_lora and norm is None else None
        all_caches = (*caches, o_cache)
        return y, AttentionCache(kept_x, *kept, v, o, lse, seqs, rotation, all_caches, rstd)

    def backward(
        self, dy: Array, cache: AttentionCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        c, seqs, rotation = cache, cache.seqs, cache.rotation
        *qkv_caches, o_cache = c.projections
        need_qkv = need_dx or self.input_lora or self._norms_trained
        o_cache.x = c.o
        do = self.o_proj.backward(dy, o_cache, grads, need_dx=need_qkv, dtype=self.dtype)
        o_cache.x = None
        if not need_qkv:
            return None
        q, k, q_rstd, k_rstd = c.q, c.k, None, None
        if self.q_norm is not None:
            q, q_rstd = self._turn(c.q, self.q_norm, rotation)
            k, k_rstd = self._turn(c.k, self.k_norm, rotation)
        dq, dk, dv = self.ops.attention_backward(
            do, q, k, c.v, c.o, c.lse, seqs, self.shape, self.dtype
        )
        del do
        dq = self._turn_back(dq, c.q, q_rstd, self.q_norm, rotation, grads)
        dk = self._turn_back(dk, c.k, k_rstd, self.k_norm, rotation, grads)
        dys = [dq, dk, dv]
        if self.fused:
            dys = [join_qkv(dq, dk, dv, self.fused, self.shape, self.ops.xp)]
        return backward_together(self.inputs, dys, qkv_caches, c.x, grads, need_dx=need_dx)
