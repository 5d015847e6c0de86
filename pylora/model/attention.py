"""Causal grouped-query attention with LoRA on any of its q, k, v and o projections.

q, k and v are projected, normed per head where the model says so (Qwen3), rotated by position
(RoPE), attended (softmax over the keys a query may see), and projected back. With a KV cache the
keys and values of earlier tokens come from it; that way has no backward.
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
    projections_of,
)
from pylora.model.rope import Rope
from pylora.model.weights import Weights, vector
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

    x: Array | None  # [m, hidden], only if q, k or v has an adapter; may be taken out and put back
    q: Array
    k: Array
    v: Array
    o: Array
    lse: Array
    seqs: Seqs
    position: np.ndarray
    projections: tuple[LinearCache, LinearCache, LinearCache, LinearCache]
    rstd: Array | None  # [m], of the norm before


class Attention:
    """The attention of one layer of `config`; modules are named model.layers.N.self_attn.*_proj."""

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
        path = f"model.layers.{layer}.self_attn"
        self.path = path
        self.ops, self.eps = ops, config.rms_norm_eps
        self.dtype: Any = ops.activation_dtype(precision)  # of what only feeds products

        def linear(name: str, biased: bool) -> LoRALinear:
            p = f"{path}.{name}"
            bias = weights(f"{p}.bias") if biased else None
            return LoRALinear(p, weights(f"{p}.weight"), bias, ops=ops, precision=precision)

        self.q_proj = linear("q_proj", config.attention_bias)
        self.k_proj = linear("k_proj", config.attention_bias)
        self.v_proj = linear("v_proj", config.attention_bias)
        self.o_proj = linear("o_proj", config.attention_out_bias)
        self.q_norm: Array | None = None
        self.k_norm: Array | None = None
        if config.qk_norm:
            self.q_norm = vector(weights, f"{path}.q_norm.weight", ops)
            self.k_norm = vector(weights, f"{path}.k_norm.weight", ops)
        self.shape = Attn(
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.head_dim**-0.5,
            config.window(layer),
        )
        self.rope = rope if rope is not None else Rope(config, ops=ops)

    def __repr__(self) -> str:
        s, n = self.shape, sum(p.lora is not None for p in self.linears)
        return (
            f"Attention({self.path}: {s.heads} heads of {s.head_dim}, {s.kv_heads} of keys, "
            f"{n} modules with an adapter)"
        )

    @property
    def linears(self) -> tuple[LoRALinear, LoRALinear, LoRALinear, LoRALinear]:
        return self.q_proj, self.k_proj, self.v_proj, self.o_proj

    @property
    def input_lora(self) -> bool:
        """Whether q, k or v has an adapter: then backward needs x."""
        return any(p.lora is not None for p in self.linears[:3])

    @property
    def trainable(self) -> bool:
        return self.input_lora or self.o_proj.lora is not None

    def _turn(
        self, x: Array, norm: Array | None, seqs: Seqs, position: np.ndarray
    ) -> tuple[Array, Array | None]:
        """Projected q or k, normed per head and rotated. Also the norm's rstd [m * heads]."""
        rstd, ops, D = None, self.ops, self.shape.head_dim
        if norm is not None:
            heads, rstd = ops.rms_norm_forward(x.reshape(-1, D), norm, self.eps)
            x = heads.reshape(x.shape)
        cos, sin = self.rope.tables(int(seqs.k_len.max(initial=0)))
        return ops.rope(x, cos, sin, position, D, dtype=self.dtype), rstd

    def _turn_back(
        self,
        dx: Array,
        raw: Array,
        rstd: Array | None,
        norm: Array | None,
        seqs: Seqs,
        position: np.ndarray,
    ) -> Array:
        """The backward of `_turn`; `raw` is its input, of which only a norm has need."""
        ops, D = self.ops, self.shape.head_dim
        cos, sin = self.rope.tables(int(seqs.k_len.max(initial=0)))
        if norm is None:
            return ops.rope(dx, cos, sin, position, D, inverse=True, dtype=self.dtype)
        dx = ops.rope(dx, cos, sin, position, D, inverse=True)
        heads, _ = ops.rms_norm_backward(dx.reshape(-1, D), raw.reshape(-1, D), norm, rstd)
        return heads.reshape(dx.shape)

    def forward(
        self,
        x: Array,
        seqs: Seqs,
        *,
        norm: Norm | None = None,
        residual: Array | None = None,
        drop: DropKey | None = None,
        position: np.ndarray | None = None,
        past: Past | None = None,
    ) -> tuple[Array, AttentionCache]:
        """x [m, hidden] -> residual + attention(x) [m, hidden], and the cache for backward.

        With `norm` it is the attention of the normed x, and the cache's x has to be put there.
        `position` [m] defaults to what `seqs` says. With `past` the new keys and values are stored
        there and the keys that `seqs` names are read from there.
        """
        position = positions(seqs) if position is None else position
        # q and k are rounded once they are rotated, so not here.
        projections = projections_of(
            self.linears[:3], x, drop=drop, dtypes=(None, None, self.dtype)
        )
        rotation = None
        if self.q_norm is None:  # nothing comes in between
            tables = self.rope.tables(int(seqs.k_len.max(initial=0)))
            rotation = Rotation(*tables, position, self.shape.head_dim)
        results, rstd = self.ops.qkv_forward(x, projections, norm, rotation, self.dtype)
        (q, _), (k, _), (v, _) = results
        kept = q, k
        if rotation is None:
            q, _ = self._turn(q, self.q_norm, seqs, position)
            k, _ = self._turn(k, self.k_norm, seqs, position)
        keys, values = k, v
        if past is not None:
            rows = self.ops.xp.asarray(past.rows)
            past.k[rows], past.v[rows] = k, v
            keys, values = past.k, past.v
        o, lse = self.ops.attention_forward(q, keys, values, seqs, self.shape, self.dtype)
        y, o_cache = self.o_proj.forward(o, residual=residual, drop=drop)
        o_cache.x = None  # o is kept below
        kept_x = x if self.input_lora and norm is None else None
        q_cache, k_cache, v_cache = caches_of(projections, results)
        caches = q_cache, k_cache, v_cache, o_cache
        return y, AttentionCache(kept_x, *kept, v, o, lse, seqs, position, caches, rstd)

    def backward(
        self, dy: Array, cache: AttentionCache, grads: Grads, *, need_dx: bool = True
    ) -> Array | None:
        """dy [m, hidden] -> dx [m, hidden], without the residual; None unless `need_dx`."""
        c, seqs, position = cache, cache.seqs, cache.position
        *qkv_caches, o_cache = c.projections
        need_qkv = need_dx or self.input_lora
        o_cache.x = c.o
        do = self.o_proj.backward(dy, o_cache, grads, need_dx=need_qkv, dtype=self.dtype)
        o_cache.x = None
        if not need_qkv:
            return None
        q, k, q_rstd, k_rstd = c.q, c.k, None, None
        if self.q_norm is not None:
            q, q_rstd = self._turn(c.q, self.q_norm, seqs, position)
            k, k_rstd = self._turn(c.k, self.k_norm, seqs, position)
        dq, dk, dv = self.ops.attention_backward(
            do, q, k, c.v, c.o, c.lse, seqs, self.shape, self.dtype
        )
        del do
        dq = self._turn_back(dq, c.q, q_rstd, self.q_norm, seqs, position)
        dk = self._turn_back(dk, c.k, k_rstd, self.k_norm, seqs, position)
        return backward_together(
            self.linears[:3], (dq, dk, dv), qkv_caches, c.x, grads, need_dx=need_dx
        )
