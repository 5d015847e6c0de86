"""`LlamaOp` by composition of a backend's operations, of any features: the reference of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pylora.ops.dora import factor
from pylora.ops.fused import split_gate_up, split_qkv
from pylora.ops.heads import norm_heads
from pylora.ops.llama import (
    EXPERT,
    NARROW,
    LayerWeights,
    LlamaWeights,
    Step,
    bias_of,
    embedding_bias,
)
from pylora.types import Array, LoRA, Norm, Projection


@dataclass(frozen=True, eq=False)
class _Adapter:
    lora: dict[int, LoRA]
    bias: dict[int, Array]
    embedding: LoRA | None
    embedding_B: Any  # packed; None where A or B is all zeros
    embedding_bias: Array | None
    embedding_factor: Array | None
    nbytes: int


class Composed:
    """`LlamaOp` by composition of a backend's operations."""

    def __init__(self, ops: Any, weights: LlamaWeights) -> None:
        self.ops, self.weights = ops, weights

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> _Adapter:
        ops, nbytes = self.ops, 0
        lora: dict[int, LoRA] = {}
        bias: dict[int, Array] = {}
        for number, low in modules.items():
            low = self._copy(low)
            lora[number] = LoRA(low.A, low.B, low.scale, magnitude=low.magnitude, norm=low.norm)
            own = bias_of(low, self.weights.module(number)[1])
            nbytes += int(low.A.nbytes + low.B.nbytes)
            if own is not None:
                bias[number] = own.copy()
                nbytes += int(own.nbytes)
        B, more, scaled = None, None, None
        if embedding is not None:
            embedding = self._copy(embedding)
            more = embedding_bias(embedding)
            if embedding.magnitude is not None:
                scaled = factor(embedding, ops.xp)
            embedding = LoRA(embedding.A, embedding.B, embedding.scale)
            nbytes += int(embedding.A.nbytes + embedding.B.nbytes)
            if bool((embedding.A != 0).any()) and bool((embedding.B != 0).any()):
                B = ops.pack(embedding.B.copy())
        return _Adapter(lora, bias, embedding, B, more, scaled, nbytes)

    def _copy(self, lora: LoRA) -> LoRA:
        """The adapter's arrays copied, where the backend computes."""
        arrays = (lora.A, lora.B, lora.bias, lora.base_bias, lora.magnitude, lora.norm)
        A, B, *others = (None if a is None else self.ops.place(a).copy() for a in arrays)
        return LoRA(A, B, lora.scale, lora.dropout, *others)

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        return tuple(k), tuple(v)

    def forward(self, cache: Any, step: Step) -> Array:
        ops, w = self.ops, self.weights
        f, x = w.features, self._embed(step)
        for i, (layer, k, v) in enumerate(zip(w.layers, *cache, strict=True)):
            normed = self._norm(x, layer.input_norm)
            o = self._attention(normed, i, k, v, step)
            first = w.starts[i] + len(f.attention_modules) - 1
            if f.parallel:
                inner = normed if layer.mid_norm is None else self._norm(x, layer.mid_norm)
                (a,) = self._linear(o, step.start, step, (first,))
                x = x + self._scaled(a) + self._scaled(self._mlp(inner, i, step))
                continue
            x = self._join(x, o, first, layer.after_attention, step)
            inner = self._norm(x, layer.mid_norm)
            if layer.experts is not None:
                y = self._experts(inner, i, step)
                if layer.after_mlp is not None:
                    y, _ = ops.norm_forward(y, layer.after_mlp)
                x = x + self._scaled(y)
                continue
            product, last = self._product(inner, i, step)
            x = self._join(x, product, last, layer.after_mlp, step)
        x = x[ops.xp.asarray(step.output)]
        if step.want_normed:
            step.normed = ops.norm_forward(x, w.norm)[0]
        normed = self._norm(x, w.norm)
        start = np.searchsorted(step.output, step.start)
        (logits,) = self._linear(normed, start, step, (w.head_number,))
        return ops.soft_cap_forward(logits, f.logit_multiplier, f.logit_softcap)

    # ---- the parts of a layer -----------------------------------------------------------------

    def _norm(self, x: Array, norm: Norm | None) -> Array:
        """What feeds products: the norm of x, or x, in the narrow type."""
        w = self.weights
        if norm is None:
            return self.ops.cast(x, w.dtype)
        y: Array = self.ops.norm_forward(x, norm, w.dtype)[0]
        return y

    def _scaled(self, y: Array) -> Array:
        s = self.weights.features.residual_multiplier
        return y if s == 1 else y * y.dtype.type(s)

    def _join(self, x: Array, y: Array, number: int, norm: Norm | None, step: Step) -> Array:
        """x + what module `number` makes of y, normed and multiplied as the model says."""
        if norm is None and self.weights.features.residual_multiplier == 1:
            return self._linear(y, step.start, step, (number,), residual=x)[0]
        (out,) = self._linear(y, step.start, step, (number,))
        if norm is not None:
            out, _ = self.ops.norm_forward(out, norm)
        return x + self._scaled(out)

    def _attention(self, x: Array, i: int, k: Array, v: Array, step: Step) -> Array:
        """o [m, heads * D] of the normed x; the new keys and values are stored."""
        ops, w, layer = self.ops, self.weights, self.weights.layers[i]
        first, rows = w.starts[i], ops.xp.asarray(step.rows)
        attn = replace(w.attn, window=layer.window, scale=layer.scale or w.attn.scale)
        if w.features.fused_qkv:
            (y,) = self._linear(x, step.start, step, (first,))
            q, key, value = split_qkv(y, w.features.fused_qkv, attn)
            value = ops.cast(value, w.dtype)
        else:
            q, key, value = self._linear(x, step.start, step, (first, first + 1, first + 2))
        q = self._turn(q, layer, layer.q_norm, step)
        k[rows] = self._turn(key, layer, layer.k_norm, step)
        v[rows] = value
        o: Array = ops.attention_forward(q, k, v, step.seqs, attn, dtype=w.dtype)[0]
        return o

    def _turn(self, x: Array, layer: LayerWeights, norm: Norm | None, step: Step) -> Array:
        ops, w = self.ops, self.weights
        D = w.attn.head_dim
        if norm is not None:
            x, _ = norm_heads(ops, x, norm, D, layer.qk_norm_of)
        if layer.rope < 0:
            y: Array = ops.cast(x, w.dtype)
            return y
        r = step.rotations[layer.rope]
        return ops.rope(x, r.cos, r.sin, r.position, D, layout=r.layout, dtype=w.dtype)

    def _product(self, x: Array, i: int, step: Step) -> tuple[Array, int]:
        """What the last module of the feed-forward part takes, and its number."""
        w, f = self.weights, self.weights.features
        first = w.starts[i] + len(f.attention_modules)
        roles = f.mlp_modules
        found = self._linear(x, step.start, step, tuple(range(first, first + len(roles) - 1)))
        gate, up = split_gate_up(found[0]) if f.fused_gate_up else (found[0], found[-1])
        up = up if f.gated else None
        product = self.ops.activation_forward(gate, up, f.activation, w.dtype)
        return product, first + len(roles) - 1

    def _mlp(self, x: Array, i: int, step: Step) -> Array:
        product, last = self._product(x, i, step)
        return self._linear(product, step.start, step, (last,))[0]

    def _experts(self, x: Array, i: int, step: Step) -> Array:
        """The sum of each token's experts, by their weights; expert by expert."""
        ops, w = self.ops, self.weights
        mix = w.layers[i].experts
        assert mix is not None
        [(logits, _)] = ops.linear_forward(x, [Projection(mix.router)])
        choice = ops.choose(logits, mix.top_k, mix.normalize)
        y = ops.zeros((x.shape[0], w.embedding.shape[1]), logits.dtype)
        first = w.starts[i] + len(w.features.attention_modules)
        for e, (rows, places) in enumerate(zip(choice.rows, choice.places)):
            if rows.size == 0:
                continue
            n, start = first + len(EXPERT) * e, np.searchsorted(rows, step.start)
            rows, places = ops.xp.asarray(rows), ops.xp.asarray(places)
            gate, up = self._linear(x[rows], start, step, (n, n + 1))
            product = ops.activation_forward(gate, up, w.features.activation, w.dtype)
            (out,) = self._linear(product, start, step, (n + 2,))
            y[rows] += out * choice.weights[rows, places][:, None]
        return y

    def _embed(self, step: Step) -> Array:
        ops, w = self.ops, self.weights
        x = ops.embedding_forward(step.ids, w.embedding)
        for adapter, a, b in zip(step.adapters, step.start, step.start[1:]):
            lora = None if adapter is None else adapter.embedding
            if lora is None or a == b:
                continue
            if adapter.embedding_B is not None:
                h = ops.xp.ascontiguousarray(lora.A[:, ops.xp.asarray(step.ids[a:b])].T)
                h = h.dtype.type(lora.scale) * h
                x[a:b], _ = ops.lora_forward(h, adapter.embedding_B, residual=x[a:b])
            if adapter.embedding_factor is not None:
                x[a:b] *= adapter.embedding_factor
            if adapter.embedding_bias is not None:
                x[a:b] += adapter.embedding_bias
        if w.features.embedding_multiplier != 1:
            x = x * x.dtype.type(w.features.embedding_multiplier)
        if w.positions is not None:
            x = x + ops.embedding_forward(step.position, w.positions)
        return x

    def _linear(
        self,
        x: Array,
        start: np.ndarray,
        step: Step,
        numbers: tuple[int, ...],
        residual: Array | None = None,
    ) -> list[Array]:
        """Some modules of one x [m, k], segment by segment: y [m, d] of each."""
        w, parts = self.weights, []
        for adapter, a, b in zip(step.adapters, start, start[1:]):
            projections = []
            for n in numbers:
                W, bias = w.module(n)
                lora = None
                if adapter is not None:
                    lora, bias = adapter.lora.get(n), adapter.bias.get(n, bias)
                rest = None if residual is None else residual[a:b]
                dtype = w.dtype if w.role(n) in NARROW else None
                projections.append(Projection(W, bias, lora, None, rest, dtype))
            parts.append([y for y, _ in self.ops.linear_forward(x[a:b], projections)])
        return [self.ops.xp.concatenate(ys) for ys in zip(*parts, strict=True)]
