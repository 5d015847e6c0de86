"""The correct attention block: whole sequences, gradients, with a cache; the whole block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.base import Base
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.types import Array, Attn, Seqs

Weights = Mapping[str, Array]
Adapters = Mapping[str, LoraTriple]


def check_shape(shape: AttentionShape, rows: int | None) -> None:
    """ValueError for a shape that is none: spec A-8."""
    if shape.head_dim < 2 or shape.head_dim % 2:
        raise ValueError(f"head_dim = {shape.head_dim}: rotary embedding turns pairs")
    if shape.kv_heads < 1 or shape.heads < 1 or shape.heads % shape.kv_heads:
        raise ValueError(f"{shape.heads} heads cannot share {shape.kv_heads} key heads evenly")
    if shape.window < 0 or shape.rope_layout not in ("half", "interleaved"):
        raise ValueError(f"window = {shape.window}, rope_layout = {shape.rope_layout!r}")
    if rows is not None and (sum(shape.lengths) != rows or min(shape.lengths, default=0) < 0):
        raise ValueError(f"lengths {shape.lengths} of {rows} rows")


class Attending(Base):
    """The methods attention, attention_backward, decoder and block."""

    attention_options = ("window", "interleaved", "scale")

    def attention(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> Array:
        y: Array = self._attend(x, weights, adapters, shape)[0]
        return y.astype(x.dtype)

    def attention_backward(
        self, dy: Array, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> tuple[Array, dict[str, tuple[Array, Array]]]:
        ops, loras = self.ops, {name: self.as_lora(a) for name, a in adapters.items()}
        _, (q, k, v, o, lse, h, seqs, attn, position) = self._attend(x, weights, adapters, shape)
        grads: dict[str, tuple[Array, Array]] = {}

        def back(name: str, g: Array, inp: Array) -> Array:
            packed = self.pack(weights[name])
            dx, dA, dB = ops.lora_backward(g, inp, h[name], packed, loras.get(name))
            if name in loras:
                grads[name] = dA.astype(x.dtype), dB.astype(x.dtype)
            return dx

        wide = self.widen(x)
        do = back("o_proj", self.widen(dy), o)
        dq, dk, dv = ops.attention_backward(do, q, k, v, o, lse, seqs, attn)
        dq = self._turned(dq, position, shape, inverse=True)
        dk = self._turned(dk, position, shape, inverse=True)
        dx = back("q_proj", dq, wide) + back("k_proj", dk, wide) + back("v_proj", dv, wide)
        return dx.astype(x.dtype), grads

    def _attend(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape
    ) -> tuple[Array, Any]:
        """The output, not rounded to 16 bits, and what backward needs."""
        check_shape(shape, x.shape[0])
        wide, h = self.widen(x), {}

        def project(name: str, inp: Array) -> Array:
            out, h[name] = self._project(name, inp, weights, adapters)
            return out

        position = self._positions(shape)
        seqs, attn = Seqs.of(shape.lengths), self._attn(shape)
        q = self._turned(project("q_proj", wide), position, shape)
        k = self._turned(project("k_proj", wide), position, shape)
        v = project("v_proj", wide)
        o, lse = self.ops.attention_forward(q, k, v, seqs, attn)
        return project("o_proj", o), (q, k, v, o, lse, h, seqs, attn, position)

    def _project(
        self, name: str, x: Array, weights: Weights, adapters: Adapters
    ) -> tuple[Array, Array | None]:
        """One of the projections, with its adapter if it has one; and h."""
        lora = self.as_lora(adapters[name]) if name in adapters else None
        y, h = self.ops.lora_forward(x, self.pack(weights[name]), None, lora)
        return y, h

    def _positions(self, shape: AttentionShape) -> Array:
        """Each row's position in its sequence."""
        return np.concatenate([np.arange(n) for n in (0, *shape.lengths)]).astype(np.int64)

    def _attn(self, shape: AttentionShape) -> Attn:
        D = shape.head_dim
        scale = D**-0.5 if shape.scale is None else shape.scale
        return Attn(shape.heads, shape.kv_heads, D, scale, shape.window)

    def _turned(
        self, x: Array, position: Array, shape: AttentionShape, inverse: bool = False
    ) -> Array:
        """x [m, heads * D] rotated by its positions; the tables are computed in float64."""
        D = shape.head_dim
        angle = shape.rope_theta ** (-np.arange(0, D, 2) / D)
        used, row = np.unique(position, return_inverse=True)
        table = np.outer(used, angle)
        cos, sin = np.cos(table).astype(x.dtype), np.sin(table).astype(x.dtype)
        row = row.reshape(-1).astype(np.int64)
        y: Array = self.ops.rope(x, cos, sin, row, D, layout=shape.rope_layout, inverse=inverse)
        return y

    def decoder(self, weights: Weights, shape: AttentionShape) -> CorrectDecoder:
        check_shape(shape, None)
        return CorrectDecoder(self, weights, shape)

    def block(
        self, x: Array, weights: Weights, adapters: Adapters, shape: AttentionShape, eps: float
    ) -> Array:
        """x₁ = x + attention(norm₁ x); x₁ + down(swiglu(norm₂ x₁))."""
        ops, wide = self.ops, self.widen(x)
        normed, _ = ops.rms_norm_forward(wide, self.widen(weights["norm1"]), eps)
        x1 = wide + self._attend(normed, weights, adapters, shape)[0]
        inner, _ = ops.rms_norm_forward(x1, self.widen(weights["norm2"]), eps)
        gate, _ = self._project("gate_proj", inner, weights, adapters)
        up, _ = self._project("up_proj", inner, weights, adapters)
        product = ops.swiglu_forward(gate, up)
        y: Array = x1 + self._project("down_proj", product, weights, adapters)[0]
        return y.astype(x.dtype)


class CorrectDecoder:
    """Keys and values of each sequence so far, as they were computed: with the adapters of then."""

    def __init__(self, maker: Attending, weights: Weights, shape: AttentionShape) -> None:
        self.maker, self.weights, self.shape = maker, weights, shape
        self.kept: dict[int, tuple[Array, Array]] = {}

    def extend(
        self, x: Array, runs: Sequence[tuple[int, int]], adapters: Sequence[Adapters]
    ) -> Array:
        if sum(n for _, n in runs) != len(x) or len(runs) != len(adapters):
            raise ValueError(f"{len(x)} rows and {len(adapters)} adapters for the runs {runs}")
        y = np.zeros((len(x), self.weights["o_proj"].shape[0]), x.dtype)
        at = 0
        for (sequence, n), lora in zip(runs, adapters):
            y[at : at + n] = self.one(sequence, self.maker.widen(x[at : at + n]), lora)
            at += n
        return y

    def one(self, sequence: int, x: Array, adapters: Adapters) -> Array:
        """The new rows of one sequence."""
        q, k, v = (
            self.maker._project(name, x, self.weights, adapters)[0]
            for name in ("q_proj", "k_proj", "v_proj")
        )
        before = self.length(sequence)
        position = self.positions(sequence, len(x))
        q = self.maker._turned(q, position, self.shape)
        k = self.maker._turned(k, position, self.shape)
        if before:
            k = np.concatenate([self.kept[sequence][0], k])
            v = np.concatenate([self.kept[sequence][1], v])
        self.kept[sequence] = k, v
        o = self.attend(q, k, v, len(x))
        return self.maker._project("o_proj", o, self.weights, adapters)[0]

    def positions(self, sequence: int, n: int) -> Array:
        """Of the sequence's next n rows."""
        return np.arange(n, dtype=np.int64) + self.length(sequence)

    def attend(self, q: Array, k: Array, v: Array, n: int) -> Array:
        """The n queries are the last rows of the sequence whose keys and values these are."""
        seqs = Seqs(*(np.array(a, np.int64) for a in ([0, n], [0], [len(k)])))
        o, _ = self.maker.ops.attention_forward(q, k, v, seqs, self.maker._attn(self.shape))
        kept: Array = o
        return kept

    def length(self, sequence: int) -> int:
        return len(self.kept[sequence][0]) if sequence in self.kept else 0

    def drop(self, sequence: int) -> None:
        self.kept.pop(sequence, None)

    def truncate(self, sequence: int, length: int) -> None:
        if not 0 <= length <= self.length(sequence):
            raise ValueError(f"sequence {sequence} has {self.length(sequence)} rows, not {length}")
        k, v = self.kept[sequence]
        self.kept[sequence] = k[:length], v[:length]
