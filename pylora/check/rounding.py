"""What rounding to float32 does to a whole model, measured: the source of `pylora check`'s bounds.

A worst-case bound of thirty layers says nothing, as it multiplies the norms of all of them. Here
the error of each operation is derived and the model itself carries it on: `Rounded` computes in
float64 and adds to each result an independent random error as large as float32 would make there.
How far a logit or a gradient moves is then its standard deviation, to first order in u = 2^-24.

The error of a sum of K terms t is that of recursive summation in a random order. Rounding the
partial sums s_1 .. s_K gives independent errors of at most u |s_j| each (Higham & Mary, "A new
approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019), and drawing
without replacement gives E sum s_j² = (K+1)/6 sum t² + (K+1)/3 (sum t)². Together with one rounding
of each product the variance is at most u² ((K+1)/6 + 1) sum t² + u² (K+1)/3 (sum t)². Blocked sums
and fused multiply-adds stay below it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends.numpy import NumpyBackend
from pylora.conformance.bounds.ops import EXP, unit
from pylora.ops.dora import factor, measured
from pylora.reference import values_of
from pylora.types import Array, Attn, Drop, LoRA, Seqs

_U = unit("f32")


class Exact(NumpyBackend):
    """The reference in float64, which stands in for exact.

    Products are of whole matrices: the bits of a row may depend on its neighbours here, and large
    models take seconds in place of hours.
    """

    def _rows(self, x: Array, M: Array) -> Array:
        return x @ M


class Rounded(Exact):
    """`Exact` with an error of float32's size on every result, drawn from `seed`."""

    def __init__(self, seed: int, *, stored: float = 0.0, embedding: bool = False) -> None:
        """`stored` > 0 also rounds the weights of adapted modules as a merge does: it is the unit
        roundoff of the dtype that they are stored in; `embedding`: the embedding is one of them."""
        super().__init__()
        self._random = np.random.default_rng(seed)
        self._stored, self._embedding = stored, embedding

    # ---- errors -------------------------------------------------------------------------------

    def _noise(self, y: Array, size: Array) -> Array:
        """y plus an error of standard deviation u * size."""
        return y + _U * size * self._random.standard_normal(y.shape)

    def _off(self, y: Array, n: Any) -> Array:
        """y with a relative error of n u on each element."""
        return self._noise(y, n * abs(y))

    def _input(self, x: Array, n: float) -> Array:
        """x as the input of sums of n terms: what each element is off by in Higham's backward
        error, sqrt(n) u; once for each element and once for each row, for sums that do not cancel.
        """
        row = 1 + _U * np.sqrt(n) * self._random.standard_normal((x.shape[0], 1))
        return self._off(x, np.sqrt(n)) * row

    def _sum(self, y: Array, squares: Array, n: int) -> Array:
        """y, sums of n terms whose squares add up to `squares`, with the error of summing."""
        return self._noise(y, np.sqrt(((n + 1) / 6 + 1) * squares + (n + 1) / 3 * y * y))

    def _rows(self, x: Array, M: Array) -> Array:
        y, M2 = x @ M, M * M
        squares = (x * x) @ M2
        out = self._sum(y, squares, x.shape[1])
        # A term below half a unit in the last place of the partial sum vanishes. The next one does
        # too, so these errors are not independent: all such terms are taken as lost.
        term, partial = (
            x * x * (M2 @ np.ones(M2.shape[1])),
            (squares + y * y).sum(axis=1, keepdims=True),
        )
        lost = term < (_U / 2) ** 2 * partial
        if lost.any():
            out += self._random.standard_normal((x.shape[0], 1)) * ((x * lost) @ M)
        return out

    # ---- operations ---------------------------------------------------------------------------

    def lora_forward(
        self,
        x: Array,
        W: Array,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None]:
        y, h = super().lora_forward(x, W, bias, lora, drop, residual)
        y = self._off(y, 3)  # scale, and the two sums
        if lora is not None and self._stored:
            merged = values_of(W) + lora.scale * (lora.B @ lora.A)
            y = self._noise(y, self._stored / _U * np.sqrt((x * x) @ (merged * merged).T))
        return y, h

    def row_norms(
        self, W: Array, lora: LoRA, squares: Array | None = None, columns: bool = False
    ) -> Array:
        n = super().row_norms(W, lora, squares, columns)
        return self._off(n, np.sqrt((lora.A.shape[1] + lora.rank) / 3) / 2 + 2)

    def dora_forward(
        self,
        x: Array,
        W: Array,
        bias: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None, Array]:
        lora = measured(self, W, lora)
        y, h, v = super().dora_forward(x, W, bias, lora, drop, residual)
        y = self._off(y, 5)  # scale, quotient, product and two sums
        if self._stored:
            f = factor(lora, np)
            merged = f[:, None] * (values_of(W) + lora.scale * (lora.B @ lora.A))
            y = self._noise(y, self._stored / _U * np.sqrt((x * x) @ (merged * merged).T))
        return y, h, v

    def dora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        v: Array,
        W: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array, Array, Array]:
        dx, dA, dB, dm = super().dora_backward(dy, x, h, v, W, lora, drop, add=add, need_dx=need_dx)
        n = np.asarray(lora.norm)
        squares = ((dy * v) ** 2).sum(axis=0) / np.where(n == 0, 1, n) ** 2
        return dx, dA, dB, self._sum(dm, squares, dy.shape[0])

    def lora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        W: Array | None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        need_dA: bool = True,
        need_dB: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array | None, Array | None]:
        dx, dA, dB = super().lora_backward(
            dy, x, h, W, lora, drop, add=add, need_dx=need_dx, need_dA=need_dA, need_dB=need_dB
        )
        m = dy.shape[0]
        if dx is not None:
            dx = self._off(dx, 3)
        if dB is not None and lora is not None and h is not None:
            dB = self._sum(dB, lora.scale**2 * ((dy * dy).T @ (h * h)), m)
        if dA is not None and lora is not None:
            g, z = dy @ lora.B, self.dropout(x, drop)
            dA = self._sum(dA, lora.scale**2 * ((g * g).T @ (z * z)), m)
        return dx, dA, dB

    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        y, rstd = super().rms_norm_forward(x, w, eps)
        off = self._off(np.ones_like(rstd), np.sqrt(x.shape[1] / 3) / 2 + 3)  # a sum of squares
        return self._off(y * off[:, None], 2), rstd * off

    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[Array, Array | None]:
        dx, dw = super().rms_norm_backward(dy, x, w, rstd, add, need_dw)
        n, r, t = x.shape[1], rstd[:, None], dy * w * x
        mean = np.sqrt((n + 1) / 6 * (t * t).sum(axis=1) + (n + 1) / 3 * t.sum(axis=1) ** 2) / n
        size = 3 * abs(r * dy * w) + abs(x) * r**3 * (mean + 3 * abs(t.mean(axis=1)))[:, None]
        return self._noise(self._off(dx, 1), size), dw

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
        x = self._off(x, 3)  # the tables, the products, the sum
        return super().rope(x, cos, sin, position, head_dim, layout, inverse)

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        n = float(max(attn.head_dim, int(seqs.k_len.max(initial=0))) + EXP**2)
        q, k, v = self._input(q, n), self._input(k, n), self._input(v, n)
        o, lse = super().attention_forward(q, k, v, seqs, attn)
        return o, self._noise(lse, abs(lse) + EXP)

    def attention_backward(
        self,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        seqs: Seqs,
        attn: Attn,
        dtype: Any = None,
    ) -> tuple[Array, Array, Array]:
        n = float(max(attn.head_dim, int(seqs.k_len.max(initial=0))) + EXP**2)
        do, q, k, v, o = (self._input(a, n) for a in (do, q, k, v, o))
        return super().attention_backward(do, q, k, v, o, lse, seqs, attn)

    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> Array:
        return self._off(super().swiglu_forward(gate, up), EXP + 4)

    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[Array, Array]:
        return super().swiglu_backward(self._off(dy, EXP + 4), self._off(gate, EXP), up)

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        y, rstd = super().layer_norm_forward(self._off(x, 1), w, b, eps)  # the mean taken away
        off = self._off(np.ones_like(rstd), np.sqrt(x.shape[1] / 3) / 2 + 3)
        bias = 0 if b is None else b
        return self._off((y - bias) * off[:, None], 3) + self._off(np.zeros_like(y) + bias, 1), rstd

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> Array:
        g = dy * w
        size = 3 * abs(g) + abs(g).mean(axis=1, keepdims=True) * np.sqrt(x.shape[1])
        dx = super().layer_norm_backward(dy, x, w, rstd, add)
        return self._noise(self._off(dx, 1), rstd[:, None] * size)

    def activation_forward(self, x: Array, up: Array | None, kind: str, dtype: Any = None) -> Array:
        if kind == "silu" and up is not None:
            return self.swiglu_forward(x, up)
        return self._off(super().activation_forward(self._off(x, 3), up, kind), EXP + 4)

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[Array, Array | None]:
        dy, x = self._off(dy, EXP + 4), self._off(x, EXP)
        return super().activation_backward(dy, x, up, kind)

    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> Array:
        y = super().soft_cap_forward(self._off(x, 3), multiplier, cap)
        return y if multiplier == 1 and not cap else self._off(y, EXP + 2)

    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> Array:
        return super().soft_cap_backward(self._off(dy, 4), y, multiplier, cap)

    def embedding_forward(self, ids: Array, W: Array) -> Array:
        y = super().embedding_forward(ids, W)
        return self._off(y, self._stored / _U) if self._embedding else y

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> Array:
        return super().embedding_backward(ids, self._off(dy, np.sqrt(len(ids))), rows)

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        nll, lse = super().cross_entropy_forward(logits, labels)
        return self._noise(nll, abs(nll) + abs(lse) + EXP), self._noise(lse, abs(lse) + EXP)

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array:
        d = super().cross_entropy_backward(logits, labels, lse, weight)
        return self._off(d, EXP + abs(logits - lse[:, None]))
