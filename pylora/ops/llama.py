"""The operation `llama`: a whole model in one call, for inference, with a KV cache and adapters.

`Backend.llama(weights)` gives an object with the methods of `LlamaOp`. `Composed` is its reference:
the backend's own operations one after the other, each row with its segment's adapter. A backend
that has the loop in compiled code (the C core) gives the same bits and saves the time between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pylora.types import Array, Attn, LoRA, Projection, Seqs

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NARROW = (2, 4, 5)  # v, gate and up only feed products; q and k are rounded once they are rotated


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer: packed weights and biases in the order of `MODULES`."""

    input_norm: Array  # [hidden]
    mid_norm: Array
    W: tuple[Any, ...]
    bias: tuple[Array | None, ...]
    q_norm: Array | None  # [head_dim]; both or neither
    k_norm: Array | None
    window: int


@dataclass(frozen=True, eq=False)
class LlamaWeights:
    """A model as the operation takes it. Modules have numbers: 7 * layer + place in `MODULES`; the
    head is 7 * layers. Nothing is copied."""

    embedding: Any  # packed [vocab, hidden]
    head: Any  # packed [vocab, hidden]; may be the same
    norm: Array
    layers: tuple[LayerWeights, ...]
    attn: Attn  # its window does not count
    eps: float
    dtype: Any  # of activations that only feed products: precision.BF16, or None

    @property
    def head_number(self) -> int:
        return len(MODULES) * len(self.layers)

    def module(self, number: int) -> tuple[Any, Array | None]:
        """(packed weight, bias) of a linear module."""
        if number == self.head_number:
            return self.head, None
        layer, place = divmod(number, len(MODULES))
        return self.layers[layer].W[place], self.layers[layer].bias[place]


@dataclass(eq=False)
class Step:
    """m new tokens of some sequences; int64 arrays, which may be changed between two calls."""

    ids: np.ndarray  # [m]
    position: np.ndarray  # [m]
    rows: np.ndarray  # [m]: the row of the KV cache that a token's k and v go to
    seqs: Seqs  # keys: rows of the cache, the new ones included
    output: np.ndarray  # [n]: the tokens whose logits are wanted, ascending
    start: np.ndarray  # [segments + 1]: tokens start[i] .. start[i+1]-1 use adapters[i]
    adapters: tuple[Any, ...]  # of `LlamaOp.adapter`, or None for the base
    cos: Array  # [positions, head_dim / 2]
    sin: Array
    native: Any = field(default=None, repr=False)  # what a backend keeps of it; see `changed`

    def changed(self) -> None:
        """To be called when a field was given another array; new numbers in the same are seen."""
        self.native = None


class LlamaOp(Protocol):
    """What `Backend.llama` returns. Threads may share it; a `Step` and a cache belong to one."""

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> Any:
        """An adapter of the modules with these numbers, ready for use; it has .nbytes.

        A copy: later changes of the arrays are not seen. The caller has checked that they fit.
        """

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        """Of each layer k and v [rows, kv_heads * head_dim], for `forward` to write and read."""

    def forward(self, cache: Any, step: Step) -> Array:
        """Stores the tokens' keys and values and gives logits [n, vocab] of the wanted ones."""


# ---- what an adapter's biases come to ------------------------------------------------------------


def bias_of(lora: LoRA, own: Array | None) -> Array | None:
    """The bias in effect where it is not the module's `own`; None where it is."""
    bias = own if lora.base_bias is None else lora.base_bias
    if lora.bias is not None and bool((lora.bias != 0).any()):
        more = lora.bias * lora.bias.dtype.type(lora.scale)
        bias = more if bias is None else bias + more
    return None if bias is own else bias


def embedding_bias(lora: LoRA) -> Array | None:
    """What is added to each row that the embedding gives, apart from A and B."""
    if lora.bias is None or not bool((lora.bias != 0).any()):
        return None
    return lora.bias.dtype.type(lora.scale) * lora.bias


# ---- the reference -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Adapter:
    lora: dict[int, LoRA]
    bias: dict[int, Array]
    embedding: LoRA | None
    embedding_B: Any  # packed; None where A or B is all zeros
    embedding_bias: Array | None
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
            lora[number] = LoRA(low.A, low.B, low.scale)
            own = bias_of(low, self.weights.module(number)[1])
            nbytes += int(low.A.nbytes + low.B.nbytes)
            if own is not None:
                bias[number] = own.copy()
                nbytes += int(own.nbytes)
        B, more = None, None
        if embedding is not None:
            embedding = self._copy(embedding)
            more = embedding_bias(embedding)
            embedding = LoRA(embedding.A, embedding.B, embedding.scale)
            nbytes += int(embedding.A.nbytes + embedding.B.nbytes)
            if bool((embedding.A != 0).any()) and bool((embedding.B != 0).any()):
                B = ops.pack(embedding.B.copy())
        return _Adapter(lora, bias, embedding, B, more, nbytes)

    def _copy(self, lora: LoRA) -> LoRA:
        """The adapter's arrays copied, where the backend computes."""
        arrays = (lora.A, lora.B, lora.bias, lora.base_bias)
        A, B, *biases = (None if a is None else self.ops.place(a).copy() for a in arrays)
        return LoRA(A, B, lora.scale, lora.dropout, *biases)

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        return tuple(k), tuple(v)

    def forward(self, cache: Any, step: Step) -> Array:
        ops, w = self.ops, self.weights
        rows, output = ops.xp.asarray(step.rows), ops.xp.asarray(step.output)
        x = self._embed(step)
        for i, (layer, k, v) in enumerate(zip(w.layers, *cache, strict=True)):
            first = len(MODULES) * i
            normed, _ = ops.rms_norm_forward(x, layer.input_norm, w.eps, dtype=w.dtype)
            q, key, value = self._linear(normed, step.start, step, (first, first + 1, first + 2))
            q = self._turn(q, layer.q_norm, step)
            k[rows] = self._turn(key, layer.k_norm, step)
            v[rows] = value
            a = w.attn
            attn = Attn(a.heads, a.kv_heads, a.head_dim, a.scale, layer.window)
            o, _ = ops.attention_forward(q, k, v, step.seqs, attn, dtype=w.dtype)
            (x,) = self._linear(o, step.start, step, (first + 3,), residual=x)
            normed, _ = ops.rms_norm_forward(x, layer.mid_norm, w.eps, dtype=w.dtype)
            gate, up = self._linear(normed, step.start, step, (first + 4, first + 5))
            product = ops.swiglu_forward(gate, up, dtype=w.dtype)
            (x,) = self._linear(product, step.start, step, (first + 6,), residual=x)
        normed, _ = ops.rms_norm_forward(x[output], w.norm, w.eps, dtype=w.dtype)
        start = np.searchsorted(step.output, step.start)
        (logits,) = self._linear(normed, start, step, (w.head_number,))
        return logits

    def _embed(self, step: Step) -> Array:
        ops = self.ops
        x = ops.embedding_forward(step.ids, self.weights.embedding)
        for adapter, a, b in zip(step.adapters, step.start, step.start[1:]):
            lora = None if adapter is None else adapter.embedding
            if lora is None or a == b:
                continue
            if adapter.embedding_B is not None:
                h = ops.xp.ascontiguousarray(lora.A[:, ops.xp.asarray(step.ids[a:b])].T)
                h = h.dtype.type(lora.scale) * h
                x[a:b], _ = ops.lora_forward(h, adapter.embedding_B, residual=x[a:b])
            if adapter.embedding_bias is not None:
                x[a:b] += adapter.embedding_bias
        return x

    def _turn(self, x: Array, norm: Array | None, step: Step) -> Array:
        ops, w = self.ops, self.weights
        D = w.attn.head_dim
        if norm is not None:
            heads, _ = ops.rms_norm_forward(x.reshape(-1, D), norm, w.eps)
            x = heads.reshape(x.shape)
        return ops.rope(x, step.cos, step.sin, step.position, D, dtype=w.dtype)

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
                narrow = n < w.head_number and n % len(MODULES) in NARROW
                dtype = w.dtype if narrow else None
                projections.append(Projection(W, bias, lora, None, rest, dtype))
            parts.append([y for y, _ in self.ops.linear_forward(x[a:b], projections)])
        return [self.ops.xp.concatenate(ys) for ys in zip(*parts, strict=True)]
