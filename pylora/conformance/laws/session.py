"""Attention with all its options, with a cache, and the whole block, in `Running` arithmetic.

What the laws of attention compare with: the value of everything, and how far a computation in the
problem's dtype may be from it (bounds/running.py). The formulas are those of spec A-1 to A-6 and G.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pylora.conformance.bounds import moves
from pylora.conformance.bounds.ops import EXP, gamma
from pylora.conformance.bounds.running import Running, join
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.types import Array

Grads = dict[str, tuple[Running, Running]]


def run(a: Any, dtype: Any) -> Running:
    """An input: exact."""
    return Running(a, 0.0, dtype)


class Projections:
    """The linear modules of a block, each with its adapter if it has one, forward and backward."""

    def __init__(
        self, weights: Mapping[str, Array], adapters: Mapping[str, LoraTriple], precision: str
    ) -> None:
        self.dtype, self.precision = next(iter(weights.values())).dtype, precision
        self.W = {name: run(W, self.dtype) for name, W in weights.items()}
        self.lora = {
            n: (run(A, self.dtype), run(B, self.dtype), scale)
            for n, (A, B, scale) in adapters.items()
        }
        self.saved = dict[str, Running]()

    def moved(self, a: Running, move: Callable[[Array, str], Array]) -> Running:
        """`a` as the precision rounds it for a product."""
        off = move(np.abs(a.value) + a.error, self.precision)
        return Running(a.value, a.error + off, self.dtype)

    def project(self, name: str, x: Running) -> Running:
        self.saved[name] = x
        y = self.moved(x, moves.of_x) @ self.W[name].T
        if n := moves.roundings(self.precision):
            # Beside the sum's roundings, which what the weight's values are sums of has too.
            size = moves.size(np.abs(self.W[name].value), self.precision)
            more = (np.abs(x.value) + x.error) @ size.T
            more = gamma(x.value.shape[1] + n, x.sums) * more
            y = Running(y.value, y.error + more, self.dtype)
        if name in self.lora:
            A, B, scale = self.lora[name]
            x, A = self.moved(x, moves.of_low), self.moved(A, moves.of_low)
            # Either order of the products, and one accumulator for base and adapter.
            other = (x @ (B @ A).T) * scale
            y = (y + (x @ A.T @ B.T) * scale).wider(other)
            y = Running(y.value, y.error + self._more(x, name), self.dtype)
        return y

    def _more(self, x: Running, name: str) -> Array:
        A, B, scale = self.lora[name]
        size = np.abs(x.value) @ np.abs(self.W[name].value).T
        size = size + abs(scale) * np.abs(x.value) @ np.abs(A.value).T @ np.abs(B.value).T
        return np.asarray(gamma(A.value.shape[0] + 2, x.sums) * size)

    def back(self, name: str, g: Running, grads: Grads) -> Running:
        x = self.moved(self.saved[name], moves.of_low)
        dx = self.moved(g, moves.of_dy) @ self.W[name]
        if name in self.lora:
            A, B, scale = self.lora[name]
            g, A, B = (self.moved(a, moves.of_low) for a in (g, A, B))
            through = g @ B
            grads[name] = (through.T @ x) * scale, (g.T @ (x @ A.T)) * scale
            # The other order of the three products has the other sum outside: both are allowed.
            grads[name] = (
                grads[name][0].wider((B.T @ (g.T @ x)) * scale),
                grads[name][1].wider(((g.T @ x) @ A.T) * scale),
            )
            dx = dx + ((through @ A) * scale).wider((g @ (B @ A)) * scale)
        return dx


def turn(x: Running, position: Array, shape: AttentionShape, sign: float = 1.0) -> Running:
    """Rotary embedding of [m, heads * D]; the angle itself may be off by a few roundings."""
    D = shape.head_dim
    frequency = shape.rope_theta ** (-np.arange(0, D, 2) / D)
    angle = np.outer(position, frequency)
    off = gamma(EXP + 2, x.sums) * np.abs(angle) + gamma(EXP, x.sums) + (x.u if x.narrow else 0.0)
    c, s = Running(np.cos(angle), off, x.dtype), Running(sign * np.sin(angle), off, x.dtype)
    c, s = c[:, None, :], s[:, None, :]
    first, second = slice(0, D // 2), slice(D // 2, D)
    if shape.rope_layout == "interleaved":
        first, second = slice(0, D, 2), slice(1, D, 2)
    heads = (len(x.value), x.value.shape[1] // D, D)
    head = Running(x.value.reshape(heads), x.error.reshape(heads), x.dtype)
    a, b = head[..., first], head[..., second]
    value, error = head.value.copy(), head.error.copy()
    for part, turned in ((first, a * c - b * s), (second, b * c + a * s)):
        value[..., part], error[..., part] = turned.value, turned.error
    return Running(value.reshape(x.value.shape), error.reshape(x.value.shape), x.dtype)


def score_scale(shape: AttentionShape) -> float:
    """What scores are multiplied by."""
    return shape.head_dim**-0.5 if shape.scale is None else float(shape.scale)


def seen(queries: Array, keys: int, window: int) -> Array:
    """[queries, keys]: whether the query at a position sees the key at one."""
    key = np.arange(keys)
    sees: Array = key <= queries[:, None]
    return sees & (key > queries[:, None] - window) if window else sees


def shares(q: Running, k: Running, sees: Array, shape: AttentionShape) -> Running:
    """P of one head: softmax of the scores of the keys that are seen, 0 for the others."""
    S = (q @ k.T) * score_scale(shape)
    value = np.where(sees, S.value, -np.inf)
    top = value.max(axis=1, keepdims=True)
    # What is taken from the scores, the largest or the log of the sum, is rounded too.
    size = np.where(sees, np.abs(S.value), 0.0) + np.abs(top)
    off = S.error + (gamma(2, S.sums) + (S.u if S.narrow else 0.0)) * size
    return Running(value - top, np.where(sees, off, 0.0), S.dtype).softmax()


def attend(
    q: Running, k: Running, v: Running, sees: Array, shape: AttentionShape
) -> tuple[Running, list[Running]]:
    """o [queries, heads * D] of one sequence, and P of each head."""
    D, group = shape.head_dim, shape.heads // shape.kv_heads
    heads, every = [], []
    for h in range(shape.heads):
        mine, shared = slice(h * D, (h + 1) * D), slice(h // group * D, (h // group + 1) * D)
        P = shares(q[:, mine], k[:, shared], sees, shape)
        every.append(P)
        heads.append(P @ v[:, shared])
    return join(heads, axis=1), every


class Block(Projections):
    """Attention over whole sequences: y, and the gradients."""

    def __init__(
        self,
        weights: Mapping[str, Array],
        adapters: Mapping[str, LoraTriple],
        s: AttentionShape,
        precision: str = "fp32",
    ) -> None:
        super().__init__(weights, adapters, precision)
        self.s = s

    def forward(self, x: Array | Running) -> Running:
        X = x if isinstance(x, Running) else run(x, self.dtype)
        s = self.s
        position = np.concatenate([np.arange(n) for n in (0, *s.lengths)])
        self.q = self.turned("q_proj", self.project("q_proj", X), position)
        self.k = self.turned("k_proj", self.project("k_proj", X), position)
        self.v = self.project("v_proj", X)
        self.position = position
        self.P: list[list[Running]] = []
        rows = [run(np.zeros((0, s.heads * s.head_dim)), self.dtype)]
        for at, n in self._sequences():
            if not n:
                self.P.append([])
                continue
            q, k, v = self.q[at], self.k[at], self.v[at]
            o, P = attend(q, k, v, seen(np.arange(n), n, s.window), s)
            rows.append(o)
            self.P.append(P)
        self.o = join(rows, axis=0)
        return self.project("o_proj", self.o)

    def turned(self, name: str, a: Running, position: Array) -> Running:
        """q or k as it goes into the scores."""
        return turn(a, position, self.s)

    def _sequences(self) -> list[tuple[slice, int]]:
        """The rows of each, and how many."""
        starts = np.concatenate([[0], np.cumsum(self.s.lengths, dtype=np.int64)])
        return [(slice(int(a), int(a) + n), n) for a, n in zip(starts, self.s.lengths)]

    def backward(self, dy: Array) -> tuple[Running, Grads]:
        grads: Grads = {}
        s, D, m = self.s, self.s.head_dim, dy.shape[0]
        group = s.heads // s.kv_heads
        do = self.back("o_proj", run(dy, self.dtype), grads)
        columns = (s.heads * D, s.kv_heads * D, s.kv_heads * D)
        value = [np.zeros((m, n)) for n in columns]
        error = [np.zeros((m, n)) for n in columns]
        size = [np.zeros((m, n)) for n in columns]
        for (at, _), each in zip(self._sequences(), self.P):
            for h, P in enumerate(each):
                mine, shared = (
                    slice(h * D, (h + 1) * D),
                    slice(h // group * D, (h // group + 1) * D),
                )
                q, k, v = self.q[at, mine], self.k[at, shared], self.v[at, shared]
                d = do[at, mine]
                dP = d @ v.T
                # sum P dP, or sum do o: equal, and computed in either way.
                inner = (P * dP).sum().wider((d * self.o[at, mine]).sum())
                dS = (P * (dP - inner)) * score_scale(s)
                parts = ((0, mine, dS @ k), (1, shared, dS.T @ q), (2, shared, P.T @ d))
                for i, cols, part in parts:
                    value[i][at, cols] += part.value
                    error[i][at, cols] += part.error
                    size[i][at, cols] += np.abs(part.value) + part.error
        # A key head adds up its query heads.
        dq, dk, dv = (
            Running(value[i], error[i] + gamma(m * group + 2, do.sums) * size[i], self.dtype)
            for i in range(3)
        )
        dq, dk = turn(dq, self.position, s, -1.0), turn(dk, self.position, s, -1.0)
        dx = self.back("q_proj", dq, grads) + self.back("k_proj", dk, grads)
        return dx + self.back("v_proj", dv, grads), grads


class Decoder:
    """The block with the keys and values of what each sequence has had so far (spec G)."""

    def __init__(
        self, weights: Mapping[str, Array], shape: AttentionShape, precision: str = "fp32"
    ) -> None:
        self.weights, self.shape, self.precision = weights, shape, precision
        self.kept: dict[Hashable, tuple[Running, Running]] = {}

    def extend(
        self, x: Array, runs: Sequence[tuple[Hashable, int]], adapters: Sequence[Any]
    ) -> Running:
        """y of the new rows: runs (sequence, rows) one behind the other, each with its adapters."""
        at, parts = 0, []
        for (name, n), lora in zip(runs, adapters, strict=True):
            parts.append(self._one(name, x[at : at + n], lora))
            at += n
        dtype = x.dtype
        width = self.weights["o_proj"].shape[0]
        return join([run(np.zeros((0, width)), dtype), *parts], axis=0)

    def _one(self, name: Hashable, x: Array, adapters: Mapping[str, LoraTriple]) -> Running:
        each, s = Projections(self.weights, adapters, self.precision), self.shape
        X, before = run(x, x.dtype), self.length(name)
        position = np.arange(before, before + len(x))
        q = turn(each.project("q_proj", X), position, s)
        k, v = turn(each.project("k_proj", X), position, s), each.project("v_proj", X)
        if name in self.kept:
            k, v = join([self.kept[name][0], k], 0), join([self.kept[name][1], v], 0)
        self.kept[name] = k, v
        if not len(x):
            return run(np.zeros((0, self.weights["o_proj"].shape[0])), x.dtype)
        return each.project("o_proj", attend(q, k, v, seen(position, len(k.value), s.window), s)[0])

    def length(self, name: Hashable) -> int:
        return len(self.kept[name][0].value) if name in self.kept else 0

    def drop(self, name: Hashable) -> None:
        self.kept.pop(name, None)

    def truncate(self, name: Hashable, length: int) -> None:
        k, v = self.kept[name]
        self.kept[name] = k[:length], v[:length]


# ---- the whole block -----------------------------------------------------------------------------


def rms_norm(x: Running, w: Array, eps: float) -> Running:
    """x / sqrt(mean(x²) + eps) w."""
    n = x.value.shape[1]
    total = (x * x).sum() * (1.0 / n) + eps
    rstd = total.value**-0.5
    # d(t^-1/2) = -t^-3/2 / 2: of an error of e, from t - e on; with three more roundings.
    low = np.maximum(total.value - total.error, 0.0)
    with np.errstate(divide="ignore"):
        off = np.where(low > 0, low**-0.5 - rstd, np.inf)
    off = off + gamma(3, x.sums) * (rstd + off)
    return x * Running(rstd, off, x.dtype) * run(w, x.dtype)


def swiglu(gate: Running, up: Running) -> Running:
    """gate σ(gate) up. The slope of gate σ(gate) is within -0.1 and 1.1."""
    g = gate.value
    value = g / (1 + np.exp(-np.clip(g, -700, 700)))
    silu = Running(value, 1.1 * gate.error + gamma(EXP + 4, gate.sums) * np.abs(value), gate.dtype)
    return (silu * 1.0) * up


def transformer(
    x: Array,
    weights: Mapping[str, Array],
    adapters: Mapping[str, LoraTriple],
    shape: AttentionShape,
    eps: float,
    precision: str,
) -> Running:
    """y of spec A-1: weights has the seven projections and the two norms."""
    linear = {n: W for n, W in weights.items() if W.ndim == 2}
    block = Block(linear, adapters, shape, precision)
    X = run(x, x.dtype)
    x1 = X + block.forward(rms_norm(X, weights["norm1"], eps))
    inner = rms_norm(x1, weights["norm2"], eps)
    product = swiglu(block.project("gate_proj", inner), block.project("up_proj", inner))
    return x1 + block.project("down_proj", product)
