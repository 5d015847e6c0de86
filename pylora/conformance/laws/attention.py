"""Laws of the attention block with adapters on its projections.

The bound is a running error analysis of the whole block (running.py), forward and backward: every
intermediate result carries how far it may be off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.conformance.bounds import moves
from pylora.conformance.bounds.ops import EXP, gamma
from pylora.conformance.bounds.running import Running, join
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import attention_problems
from pylora.conformance.protocol import AttentionShape, LoraTriple
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

Grads = dict[str, tuple[Running, Running]]


class Block:
    """The block in `Running` arithmetic: value and error of everything."""

    def __init__(
        self,
        weights: Mapping[str, Array],
        adapters: Mapping[str, LoraTriple],
        s: AttentionShape,
        precision: str = "fp32",
    ) -> None:
        self.dtype, self.precision = weights["q_proj"].dtype, precision
        self.W = {name: self.run(W) for name, W in weights.items()}
        self.lora = {n: (self.run(A), self.run(B), scale) for n, (A, B, scale) in adapters.items()}
        self.s, self.saved = s, dict[str, Running]()

    def run(self, a: Any) -> Running:
        return Running(a, 0.0, self.dtype)

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
            more = gamma(x.value.shape[1] + n, self.dtype) * more
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
        return np.asarray(gamma(A.value.shape[0] + 2, self.dtype) * size)

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

    def turn(self, x: Running, sign: float) -> Running:
        """Rotary embedding of [m, heads * D]; the angle itself may be off by a few roundings."""
        D, half = self.s.head_dim, self.s.head_dim // 2
        frequency = self.s.rope_theta ** (-np.arange(0, D, 2) / D)
        position = np.concatenate([np.arange(n) for n in self.s.lengths])
        angle = np.outer(position, frequency)
        off = gamma(EXP + 2, self.dtype) * np.abs(angle) + gamma(EXP, self.dtype)
        c = Running(np.cos(angle), off, self.dtype)
        s = Running(sign * np.sin(angle), off, self.dtype)
        parts = []
        for h in range(x.value.shape[1] // D):
            a, b = x[:, h * D : h * D + half], x[:, h * D + half : (h + 1) * D]
            parts += [a * c - b * s, b * c + a * s]
        return join(parts, axis=1)

    def forward(self, x: Array) -> Running:
        X, s = self.run(x), self.s
        self.q = self.turn(self.project("q_proj", X), 1.0)
        self.k = self.turn(self.project("k_proj", X), 1.0)
        self.v = self.project("v_proj", X)
        self.P: dict[tuple[int, int], Running] = {}
        rows = []
        for t, a in self._rows():
            heads = []
            for h in range(s.heads):
                q, k, v = self._parts(t, a, h)
                S = (q @ k.T) * (s.head_dim**-0.5)
                # What is taken from the scores, the largest or the log of the sum, is rounded too.
                top = float(S.value.max())
                off = S.error + gamma(2, self.dtype) * (np.abs(S.value) + abs(top))
                self.P[t, h] = Running(S.value - top, off, self.dtype).softmax()
                heads.append(self.P[t, h] @ v)
            rows.append(join(heads, axis=1))
        self.o = join(rows, axis=0)
        return self.project("o_proj", self.o)

    def _rows(self) -> list[tuple[int, int]]:
        """(query row, first key row) of each row; it sees keys up to itself."""
        starts = np.concatenate([[0], np.cumsum(self.s.lengths)])
        return [
            (t, int(first))
            for first, end in zip(starts[:-1], starts[1:])
            for t in range(int(first), int(end))
        ]

    def _parts(self, t: int, a: int, h: int) -> tuple[Running, Running, Running]:
        D = self.s.head_dim
        g = h // (self.s.heads // self.s.kv_heads)
        mine, shared = slice(h * D, (h + 1) * D), slice(g * D, (g + 1) * D)
        return self.q[t : t + 1, mine], self.k[a : t + 1, shared], self.v[a : t + 1, shared]

    def backward(self, dy: Array) -> tuple[Running, Grads]:
        grads: Grads = {}
        s, D, m = self.s, self.s.head_dim, dy.shape[0]
        do = self.back("o_proj", self.run(dy), grads)
        shape = (m, s.heads * D), (m, s.kv_heads * D), (m, s.kv_heads * D)
        value = [np.zeros(n) for n in shape]
        error = [np.zeros(n) for n in shape]
        size = [np.zeros(n) for n in shape]

        def add(i: int, rows: slice, columns: slice, part: Running) -> None:
            value[i][rows, columns] += part.value
            error[i][rows, columns] += part.error
            size[i][rows, columns] += np.abs(part.value) + part.error

        for t, a in self._rows():
            for h in range(s.heads):
                g = h // (s.heads // s.kv_heads)
                mine, shared = slice(h * D, (h + 1) * D), slice(g * D, (g + 1) * D)
                q, k, v = self._parts(t, a, h)
                P, d = self.P[t, h], do[t : t + 1, mine]
                dP = d @ v.T
                # sum P dP, or sum do o: equal, and computed in either way.
                inner = (P * dP).sum().wider((d * self.o[t : t + 1, mine]).sum())
                dS = (P * (dP - inner)) * (D**-0.5)
                add(0, slice(t, t + 1), mine, dS @ k)
                add(1, slice(a, t + 1), shared, dS.T @ q)
                add(2, slice(a, t + 1), shared, P.T @ d)
        n = m * s.heads // s.kv_heads  # the sums over queries and the heads that share a key
        dq, dk, dv = (
            Running(value[i], error[i] + gamma(n, self.dtype) * size[i], self.dtype)
            for i in range(3)
        )
        dx = self.back("q_proj", self.turn(dq, -1.0), grads)
        dx = dx + self.back("k_proj", self.turn(dk, -1.0), grads)
        return dx + self.back("v_proj", dv, grads), grads


def _block(t: Trial, p: Problem) -> Block:
    weights = {name: t.weight(W) for name, W in p.weights.items()}
    return Block(weights, p.adapters, p.shape, t.precision)


def _forward(t: Trial, p: Problem) -> None:
    y = t.attention(p.x, p.weights, p.adapters, p.shape)
    want = _block(t, p).forward(p.x)
    t.expect("y", y, want.value, _twice_if_64(p) * want.error)


def _backward(t: Trial, p: Problem) -> None:
    dx, grads = t.attention_backward(p.dy, p.x, p.weights, p.adapters, p.shape)
    block = _block(t, p)
    block.forward(p.x)
    want, wants = block.backward(p.dy)
    twice = _twice_if_64(p)
    t.expect("dx", dx, want.value, twice * want.error)
    for name, pair in wants.items():
        for letter, got, w in zip("AB", grads[name], pair):
            t.expect(f"d{letter} of {name}", got, w.value, twice * w.error)


def _both(t: Trial, p: Problem) -> None:
    _forward(t, p)
    _backward(t, p)


def _twice_if_64(p: Problem) -> float:
    """What is exact here is computed in float64, and is then off by as much itself."""
    return 2.0 if p.x.dtype == np.float64 else 1.0 + 2.0**-20


def _causal(t: Trial, p: Problem) -> None:
    """Rows after a cut of a sequence, and other sequences, are exchanged: earlier rows stay."""
    rng = np.random.default_rng(p.seed)
    which = int(rng.integers(len(p.shape.lengths)))
    start, n = sum(p.shape.lengths[:which]), p.shape.lengths[which]
    seen = int(rng.integers(1, n + 1))
    kept = np.arange(start, start + seen)
    x = rng.normal(size=p.x.shape).astype(p.x.dtype)
    x[kept] = p.x[kept]
    before = t.attention(p.x, p.weights, p.adapters, p.shape)
    after = t.attention(x, p.weights, p.adapters, p.shape)
    bound = 2 * _block(t, p).forward(p.x).error[kept]
    t.expect("rows whose past is the same", after, before[kept], bound, at=kept)


LAWS = (
    Law(
        "A1",
        "The attention block with adapters agrees with the formulas (float32).",
        "softmax(q kᵀ / sqrt(D)) v with rotary q and k, each projection x Wᵀ + s (x Aᵀ) Bᵀ; "
        "running error analysis",
        "an adapter on the wrong projection, a wrong rotation, mask, or head",
        ("A-3", "A-4", "F-1"),
        ("attention", "float32"),
        attention_problems,
        _forward,
        ("x",),
    ),
    Law(
        "A2",
        "The gradients of the attention block agree with the formulas (float32).",
        "A-5 of the specification, and B1 for each projection; running error analysis",
        "a path of the gradient is missing: dx lacks one projection, a key head one query head",
        ("A-5", "B-1"),
        ("attention_backward", "float32"),
        attention_problems,
        _backward,
        ("x", "dy"),
    ),
    Law(
        "A3",
        "The attention block and its gradients agree with the formulas (float64).",
        "as A1 and A2, with u = 2⁻⁵³",
        "as A1 and A2, and anything computed in float32",
        ("A-4", "A-5"),
        ("attention", "attention_backward", "float64"),
        lambda: attention_problems(dtype="float64"),
        _both,
        ("x", "dy"),
    ),
    Law(
        "A4",
        "A token does not see later tokens or other sequences.",
        "rows whose own past is unchanged stay within twice A1's bound when all others change",
        "the causal mask is off by one, or packed sequences leak into each other",
        ("A-4", "A-7"),
        ("attention", "float32"),
        attention_problems,
        _causal,
        (),
    ),
)
