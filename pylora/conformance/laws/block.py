"""The attention block with adapters in `Running` arithmetic: every number of it, forward and
backward, with how far an implementation may be from it (bounds/running.py).

Sequences of one length are computed at once, all heads too: arrays [sequences, key heads, heads of
each, rows, ...]. In 16 bits sums are those of float32, and whatever is an array of its own may be
stored (`keep`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.conformance.bounds import moves
from pylora.conformance.bounds.ops import EXP, gamma
from pylora.conformance.bounds.running import Running, join
from pylora.conformance.protocol import AttentionShape, LoraTriple
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
        self.narrow = weights["q_proj"].dtype.itemsize == 2
        self.dtype: Any = np.float32 if self.narrow else weights["q_proj"].dtype
        self.stored, self.precision = str(weights["q_proj"].dtype), precision
        self.W = {name: self.run(W) for name, W in weights.items()}
        self.lora = {n: (self.run(A), self.run(B), scale) for n, (A, B, scale) in adapters.items()}
        self.s, self.saved = s, dict[str, Running]()

    def run(self, a: Any) -> Running:
        return Running(a, 0.0, self.dtype)

    def keep(self, a: Running) -> Running:
        """`a` as it may be stored between two operations, which costs 16 bits two roundings: the
        result itself, and a factor (a scale, an angle) that was one of its own."""
        if not self.narrow:
            return a
        off = gamma(2, {"float16": "f16"}.get(self.stored, "bf16")) * (np.abs(a.value) + a.error)
        return Running(a.value, a.error + off, self.dtype)

    def moved(self, a: Running, move: Callable[[Array, str], Array]) -> Running:
        """`a` as the precision rounds it for a product."""
        if self.precision == "fp32":
            return a
        off = move(np.abs(a.value) + a.error, self.precision)
        return Running(a.value, a.error + off, self.dtype)

    def project(self, name: str, x: Running, rows: Array | None = None) -> Running:
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
            update = self.keep(self.keep(x @ A.T) @ B.T) * scale
            y = (self.keep(y) + self.keep(update)).wider(other)
            y = Running(y.value, y.error + self._more(x, name), self.dtype)
        return self.keep(y)

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
            through = self.keep(g @ B)
            grads[name] = (through.T @ x) * scale, (g.T @ self.keep(x @ A.T)) * scale
            # The other order of the three products has the other sum outside: both are allowed.
            grads[name] = (
                grads[name][0].wider((B.T @ (g.T @ x)) * scale),
                grads[name][1].wider(((g.T @ x) @ A.T) * scale),
            )
            grads[name] = self.keep(grads[name][0]), self.keep(grads[name][1])
            update = self.keep((through @ A) * scale)
            dx = self.keep(dx) + update.wider((g @ (B @ A)) * scale)
        return self.keep(dx)

    def turn(self, x: Running, sign: float = 1.0, rows: Array | None = None) -> Running:
        """Rotary embedding of [m, heads * D]; the angle itself may be off by a few roundings."""
        D, half = self.s.head_dim, self.s.head_dim // 2
        frequency = self.s.rope_theta ** (-np.arange(0, D, 2) / D)
        lengths = np.asarray(self.s.lengths)
        position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        angle = np.outer(position, frequency)
        off = gamma(EXP + 2, self.dtype) * np.abs(angle) + gamma(EXP, self.dtype)
        c = Running(np.cos(angle), off, self.dtype)
        s = Running(sign * np.sin(angle), off, self.dtype)
        if rows is not None:
            c, s = c[rows], s[rows]
        c, s = c[:, None], s[:, None]
        heads = Running(
            x.value.reshape(len(x.value), -1, D), x.error.reshape(len(x.value), -1, D), self.dtype
        )
        a, b = heads[..., :half], heads[..., half:]
        turned = join([a * c - b * s, b * c + a * s], axis=2)
        flat = turned.value.reshape(x.value.shape), turned.error.reshape(x.value.shape)
        return self.keep(Running(*flat, self.dtype))

    def forward(self, x: Array, rows: Array | None = None) -> Running:
        """y of all rows; with `rows`, which asks for a single sequence, of these alone."""
        X, s = self.run(x), self.s
        k, v = self.turn(self.project("k_proj", X)), self.project("v_proj", X)
        seen = np.arange(len(x)) if rows is None else rows
        q = self.turn(self.project("q_proj", X[seen]), rows=seen)
        o: list[tuple[Array, Running]] = []
        self.parts: list[tuple[Array, tuple[Running, ...]]] = []
        for at in self._groups() if rows is None else [np.arange(len(x))[None]]:
            mine = at if rows is None else np.arange(len(rows))[None]
            Q, K, V = self._heads(q, mine), self._heads(k, at), self._heads(v, at)
            S = self.keep((Q @ K.mT) * (s.head_dim**-0.5))
            order = np.arange(at.shape[1])
            hidden = order[None] > (order if rows is None else rows)[:, None]
            P = self.keep(self._softmax(S, hidden))
            O = self.keep(P @ V)
            self.parts.append((at, (Q, K, V, P, O)))
            o.append((mine, self._rows(O)))
        return self.project("o_proj", self._placed(o), seen)

    def _softmax(self, S: Running, hidden: Array) -> Running:
        value = np.where(hidden, -np.inf, S.value)
        # What is taken from the scores, the largest or the log of the sum, is rounded too.
        top = value.max(axis=-1, keepdims=True)
        off = S.error + gamma(2, self.dtype) * (np.abs(S.value) + np.abs(top))
        P = Running(value - top, np.where(hidden, 0.0, off), self.dtype).softmax()
        return Running(P.value, np.where(hidden, 0.0, P.error), self.dtype)

    def _groups(self) -> list[Array]:
        """[sequences, rows]: the rows of all sequences of one length, length by length."""
        lengths = np.asarray(self.s.lengths)
        starts = np.cumsum(lengths) - lengths
        return [starts[lengths == n][:, None] + np.arange(n)[None] for n in np.unique(lengths) if n]

    def _heads(self, a: Running, at: Array) -> Running:
        """Rows `at` [sequences, rows] as [sequences, key heads, heads of each, rows, D]."""
        G, D = self.s.kv_heads, self.s.head_dim

        def shaped(v: Array) -> Array:
            five = v[at].reshape(*at.shape, G, v.shape[1] // (G * D), D)
            return five.transpose(0, 2, 3, 1, 4)

        return Running(shaped(a.value), shaped(a.error), self.dtype)

    def _rows(self, a: Running) -> Running:
        """The way back: [sequences * rows, heads * D]."""

        def flat(v: Array) -> Array:
            S, G, R, n, D = v.shape
            return v.transpose(0, 3, 1, 2, 4).reshape(S * n, G * R * D)

        return Running(flat(a.value), flat(a.error), self.dtype)

    def _placed(self, parts: list[tuple[Array, Running]]) -> Running:
        """The rows of all parts, each where it belongs."""
        order = np.argsort(np.concatenate([at.reshape(-1) for at, _ in parts]))
        return join([part for _, part in parts], axis=0)[order]

    def backward(self, dy: Array) -> tuple[Running, Grads]:
        """After `forward` of all rows: dx, and the gradients of each adapter."""
        grads: Grads = {}
        s = self.s
        do = self.keep(self.back("o_proj", self.run(dy), grads))
        rows: list[list[tuple[Array, Running]]] = [[], [], []]
        for at, (Q, K, V, P, O) in self.parts:
            d = self._heads(do, at)
            dP = self.keep(d @ V.mT)
            # sum P dP, or sum do o: equal, and computed in either way.
            inner = (P * dP).sum().wider((d * O).sum())
            dS = self.keep((P * (dP - inner)) * (s.head_dim**-0.5))
            found = (
                dS @ K,
                self._shared(dS).mT @ self._shared(Q),
                self._shared(P).mT @ self._shared(d),
            )
            for i, part in enumerate(found):
                rows[i].append((at, self._rows(self.keep(part))))
        dq, dk, dv = (self._placed(r) for r in rows)
        dx = self.back("q_proj", self.turn(dq, -1.0), grads)
        dx = dx + self.back("k_proj", self.turn(dk, -1.0), grads)
        return dx + self.back("v_proj", dv, grads), grads

    def _shared(self, a: Running) -> Running:
        """The rows of all heads that share a key head, one behind the other."""

        def joined(v: Array) -> Array:
            S, G, R, n, D = v.shape
            return v.reshape(S, G, 1, R * n, D)

        return Running(joined(a.value), joined(a.error), self.dtype)
