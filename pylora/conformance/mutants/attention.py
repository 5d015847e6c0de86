"""The attention block with adapters on its four projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.reference import Reference
from pylora.types import Array, Attn, LoRA, Seqs

Weights = Mapping[str, Array]
Adapters = Mapping[str, LoraTriple]


@wrong(
    "attention-k-adapter-after-rope",
    "subtle",
    "The adapter of k is added after the rotation.",
    "The update is computed beside a fused projection and rotation.",
)
class KAdapterAfterRope(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        y, h = super()._project(name, x, weights, adapters)
        if name != "k_proj" or name not in adapters:
            return y, h
        base, _ = super()._project(name, x, weights, {})
        return base + self._unrotated(y - base), h

    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        self.shape = shape
        return super().attention(x, weights, adapters, shape)

    def attention_backward(self, dy: Array, x: Array, *rest: Any) -> Any:
        self.shape = rest[2]
        return super().attention_backward(dy, x, *rest)

    def _unrotated(self, update: Array) -> Array:
        """What the rotation that follows turns into `update`."""
        D, position = self.shape.head_dim, self._positions(self.shape)
        angle = self.shape.rope_theta ** (-np.arange(0, D, 2) / D)
        table = np.outer(np.arange(position.max(initial=-1) + 1), angle)
        cos, sin = np.cos(table).astype(update.dtype), np.sin(table).astype(update.dtype)
        return self.ops.rope(update, cos, sin, position, D, inverse=True)


class _Tiled(Reference):
    """Query head i uses key head i % kv_heads."""

    def _tile(self, k: Array, attn: Attn) -> Array:
        heads = k.reshape(k.shape[0], attn.kv_heads, attn.head_dim)
        return np.tile(heads, (1, attn.heads // attn.kv_heads, 1)).reshape(k.shape[0], -1)

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        whole = Attn(attn.heads, attn.heads, attn.head_dim, attn.scale)
        return super().attention_forward(q, self._tile(k, attn), self._tile(v, attn), seqs, whole)


@wrong(
    "attention-gqa-tiled",
    "subtle",
    "Key heads are tiled (0 1 0 1) where each is to be repeated (0 0 1 1).",
    "tile and repeat differ by an axis; with one key head, or as many as heads, they agree.",
    "ekzhang/jax-js#180",
)
class GqaTiled(Correct):
    ops = _Tiled()


class _SeesTheNext(Reference):
    def _spans(self, seqs: Seqs, attn: Attn) -> list[tuple[int, int, int]]:
        last = int(seqs.k_start[-1] + seqs.k_len[-1]) if len(seqs.k_len) else 0
        return [(t, a, min(b + 1, last)) for t, a, b in super()._spans(seqs, attn)]


@wrong(
    "attention-mask-off-by-one",
    "gross",
    "A token sees the one after it.",
    "tril with the wrong diagonal.",
)
class SeesTheNext(Correct):
    ops = _SeesTheNext()


class _NotItself(Reference):
    def _spans(self, seqs: Seqs, attn: Attn) -> list[tuple[int, int, int]]:
        return [(t, a, max(b - 1, a + 1)) for t, a, b in super()._spans(seqs, attn)]


@wrong(
    "attention-not-itself",
    "gross",
    "A token does not see itself.",
    "tril with the other wrong diagonal.",
)
class NotItself(Correct):
    ops = _NotItself()


@wrong(
    "attention-positions-reset-late",
    "subtle",
    "Positions restart one row after a sequence's first.",
    "The boundary of packed samples, off by one: each first token has the position after the last.",
)
class PositionsResetLate(Correct):
    def _positions(self, shape: AttentionShape) -> Array:
        right = super()._positions(shape)
        return np.where((right == 0) & (np.arange(right.size) > 0), np.roll(right, 1) + 1, right)


class _SequencesSeeEachOther(Reference):
    def _spans(self, seqs: Seqs, attn: Attn) -> list[tuple[int, int, int]]:
        return [(t, 0, b) for t, _, b in super()._spans(seqs, attn)]


@wrong(
    "attention-leaks-between-sequences",
    "gross",
    "A sequence sees those that lie before it in the batch.",
    "Packing without a mask of documents.",
    "huggingface/nanoVLM#204",
)
class LeaksBetweenSequences(Correct):
    ops = _SequencesSeeEachOther()


@wrong(
    "attention-o-adapter-missing",
    "gross",
    "The adapter of o_proj is not applied.",
    "Only q and v were adapted in the first programs.",
)
class OAdapterMissing(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        y, h = super()._project(name, x, weights, adapters)
        return (super()._project(name, x, weights, {})[0] if name == "o_proj" else y), h


@wrong(
    "attention-scaled-by-rank",
    "subtle",
    "The scores are scaled by 1 / sqrt(head_dim + rank of q's adapter).",
    "The width that the kernel is told includes the columns that ride along.",
)
class ScaledByRank(Correct):
    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        y, h = super()._project(name, x, weights, adapters)
        if name == "q_proj" and name in adapters:
            D, r = self.head_dim, adapters[name][0].shape[0]
            y = y * y.dtype.type((D / (D + r)) ** 0.5)
        return y, h

    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        self.head_dim = shape.head_dim
        return super().attention(x, weights, adapters, shape)

    def attention_backward(self, dy: Array, x: Array, *rest: Any) -> Any:
        self.head_dim = rest[2].head_dim
        return super().attention_backward(dy, x, *rest)


class _TurnsForwardAgain(Reference):
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
        return super().rope(x, cos, sin, position, head_dim, layout)


@wrong(
    "attention-rope-backward-forward",
    "subtle",
    "The backward pass turns by the same angle, not back.",
    "The kernel is reused and its flag is not.",
)
class RopeBackwardForward(Correct):
    ops = _TurnsForwardAgain()


@wrong(
    "attention-dx-of-v-missing",
    "gross",
    "dx lacks the part that comes through v.",
    "Three branches, two of them added.",
)
class DxOfVMissing(Correct):
    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        dx, grads = super().attention_backward(dy, x, weights, adapters, shape)
        return dx - self._through_v(dy, x, weights, adapters, shape), grads

    def _through_v(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        _, (q, k, v, o, lse, h, seqs, attn, *_) = self._attend(x, weights, adapters, shape)
        loras = {name: LoRA(*a) for name, a in adapters.items()}
        do, _, _ = self.ops.lora_backward(
            dy, o, h["o_proj"], weights["o_proj"], loras.get("o_proj")
        )
        _, _, dv = self.ops.attention_backward(do, q, k, v, o, lse, seqs, attn)
        dx, _, _ = self.ops.lora_backward(
            dv, x, h["v_proj"], weights["v_proj"], loras.get("v_proj")
        )
        return dx
