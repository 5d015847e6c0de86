"""Every operation of pylora in array notation, forward and hand-written backward: the oracle.

It reads like the paper (Hu et al., "LoRA", 2021; DoRA is in ops/decomposed.py, merging in
ops/merge.py, what families add in ops/formulas.py) and runs over any NumPy-like namespace `xp`
(NumPy, CuPy) in float32 or float64. It is written to be right, not fast. Letters: m tokens, k
input and d output features, r rank; x [m,k], W [d,k], A [r,k], B [d,r].

Row-wise products (`_rows`) multiply each row by itself, because a BLAS chooses its order of
summation by the number of rows, and the bits of a row must not depend on its neighbours.

Precisions. A weight is the values that its precision keeps (NumpyBackend.pack makes them), and the
arithmetic here is always that of the arrays' own dtype. A backend may round more, and no more than
its precision says:

    fp32         nothing
    fp32x3       x and W to the sum of two bfloat16 halves, and the product of the lower halves is
                 left out
    bf16         x, dy, and A and B in h = x Aᵀ and g = dy B, to bfloat16 before they are multiplied
    int8, int4   x to 16-bit integers, with one scale for each row and group of 32; dy not at all

`dtype` is that of a result that only feeds products: precision.BF16 rounds it to bfloat16, once;
None leaves it in the dtype of the computation.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.errors import BackendError, RangeError
from pylora.numbers.philox import philox
from pylora.numbers.precision import as_dtype
from pylora.ops.decomposed import Decomposed
from pylora.ops.formulas import Formulas
from pylora.ops.merge import Merge
from pylora.ops.plain import Plain
from pylora.types import (
    AdamW,
    Array,
    Attn,
    Drop,
    LoRA,
    Seqs,
)

IGNORE = -100  # a label with this value is not counted in the loss


class Reference(Formulas, Decomposed, Merge, Plain):
    """The operations over the array namespace `xp`. Inputs are never written to."""

    to_numpy: Any = staticmethod(np.asarray)  # a backend whose arrays are elsewhere has its own

    def __init__(self, xp: Any = np) -> None:
        self.xp = xp

    # ---- LoRA linear --------------------------------------------------------------------------

    def _rows(self, x: Array, M: Array) -> Array:
        """x [m,k] times M [k,n], one row at a time; x in rows, since BLAS is for those alone."""
        return self.xp.matmul(self.xp.ascontiguousarray(x)[:, None, :], M)[:, 0]

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
        """h = drop(x) Aᵀ [m,r]; y = residual + x Wᵀ + bias + s h Bᵀ [m,d]. Returns y, h.

        Where B is all zeros the low-rank term is left out: zero-init is the base, bit for bit.
        An adapter with a magnitude goes by `dora_forward` (pylora.ops.decomposed).
        """
        if lora is not None and lora.magnitude is not None:
            return self.dora_forward(x, W, bias, lora, drop, residual, dtype)[:2]
        y, h = self._rows(x, values_of(W).T), None
        if bias is not None:
            y = y + bias
        if lora is not None:
            h = self._rows(self.dropout(x, drop), lora.A.T)
            if bool((lora.B != 0).any()):
                y = y + x.dtype.type(lora.scale) * self._rows(
                    h, self.xp.ascontiguousarray(lora.B).T
                )
        return as_dtype(y if residual is None else residual + y, dtype), h

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
        """g = dy B; dB = s dyᵀ h [d,r]; dA = s gᵀ drop(x) [r,k]; dx = add + dy W + s drop'(g A).

        Returns (dx, dA, dB), None where not needed. W is frozen and gets no gradient. `add` may be
        overwritten by a backend; the caller gives it away. `dtype` is dx's, without `add`.
        """
        dx = dA = dB = None
        if need_dx:
            dx = self._rows(dy, values_of(W))
        if lora is not None:
            s = dy.dtype.type(lora.scale)
            g = self._rows(dy, lora.B)
            if need_dB:
                dB = s * (dy.T @ h)
            if need_dA:
                dA = s * (g.T @ self.dropout(x, drop))
            if dx is not None and bool((lora.B != 0).any()):
                dx = dx + self.dropout(s * self._rows(g, lora.A), drop)
        if dx is not None:
            dx = as_dtype(dx, dtype) if add is None else add + dx
        return dx, dA, dB

    # ---- transformer --------------------------------------------------------------------------

    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        """rstd = 1 / sqrt(mean(x²) + eps) [m]; y = x rstd w (Zhang & Sennrich 2019).

        Returns y, rstd.
        """
        rstd = 1 / self.xp.sqrt((x * x).mean(axis=1) + x.dtype.type(eps))
        return as_dtype(x * rstd[:, None] * w, dtype), rstd

    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[Array, Array | None]:
        """dx = add + rstd (dy w - x rstd² mean(dy w x)); dw = sum over rows of dy x rstd."""
        r, dyw = rstd[:, None], dy * w
        dx = r * (dyw - x * r * r * (dyw * x).mean(axis=1)[:, None])
        dw = (dy * x * r).sum(axis=0) if need_dw else None
        return (dx if add is None else add + dx), dw

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
        """Rotates pairs of each head by its position's angles (Su et al. 2021); `inverse` undoes.

        x [m, heads * D]; cos, sin [positions, R/2], R <= D; layout "half" pairs (i, i + R/2),
        "interleaved" pairs (2i, 2i + 1); the numbers from R on stay. A rotation's transpose is its
        inverse, so backward is inverse=True; that holds for tables that were multiplied, too.
        """
        m, half = x.shape[0], cos.shape[1]
        _in_range("position", position, cos.shape[0])
        c, s = cos[position][:, None, :], sin[position][:, None, :]
        s = -s if inverse else s
        pairs = {
            "half": (slice(0, half), slice(half, 2 * half)),
            "interleaved": (slice(0, 2 * half, 2), slice(1, 2 * half, 2)),
        }
        if layout not in pairs:
            raise BackendError(f"rope: layout {layout!r} is none of {', '.join(pairs)}")
        first, second = pairs[layout]
        heads = x.reshape(m, x.shape[1] // head_dim, head_dim)
        y, a, b = heads.copy(), heads[..., first], heads[..., second]
        y[..., first], y[..., second] = a * c - b * s, b * c + a * s
        return as_dtype(y.reshape(x.shape), dtype)

    def _spans(self, seqs: Seqs, attn: Attn) -> list[tuple[int, int, int]]:
        """(query row, first key row, end of key rows) for each query."""
        spans = []
        for i, (start, n) in enumerate(zip(seqs.k_start.tolist(), seqs.k_len.tolist())):
            rows = range(int(seqs.q_start[i]), int(seqs.q_start[i + 1]))
            for t in rows:
                seen = n - (rows[-1] - t)
                low = max(0, seen - attn.window) if attn.window else 0
                spans.append((t, start + low, start + seen))
        return spans

    def _heads(self, attn: Attn, *arrays: Array) -> list[Array]:
        """Views [rows, kv_heads, heads / kv_heads or 1, D]: a kv head and the heads it serves."""
        G, D = attn.kv_heads, attn.head_dim
        return [a.reshape(a.shape[0], G, a.shape[1] // (G * D), D) for a in arrays]

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        """P = softmax(scale q kᵀ) over the keys a query may see; o = P v. Gives o, lse [m, heads].

        With a softcap c the scores are c tanh(scale q kᵀ / c) (Gemma 2). q [m, heads * D]; k, v
        [n, kv_heads * D]; lse is the log of the softmax's denominator.
        """
        xp, o = self.xp, self.xp.zeros_like(q)
        lse = xp.zeros((q.shape[0], attn.heads), q.dtype)
        Q, K, V, O = self._heads(attn, q, k, v, o)
        for t, a, b in self._spans(seqs, attn):
            S = q.dtype.type(attn.scale) * (Q[t] @ K[a:b, :, 0].transpose(1, 2, 0))  # [G, H/G, b-a]
            S = self.capped(S, attn.softcap)
            top = S.real.max(axis=-1, keepdims=True)
            E = xp.exp(S - top)
            total = E.sum(axis=-1, keepdims=True)
            O[t] = (E / total) @ V[a:b, :, 0].transpose(1, 0, 2)
            lse[t] = (top + xp.log(total)).reshape(-1)
        return as_dtype(o, dtype), lse

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
        """dP = do vᵀ; dS = P (dP - sum(do o)); dq = scale dS k; dk = scale dSᵀ q; dv = Pᵀ do.

        With a softcap c, dS is multiplied by 1 - (S / c)², S being the capped scores.
        """
        xp, scale = self.xp, q.dtype.type(attn.scale)
        dq, dk, dv = xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
        Q, K, V, O, dO, dQ, dK, dV = self._heads(attn, q, k, v, o, do, dq, dk, dv)
        L = lse.reshape(-1, attn.kv_heads, attn.heads // attn.kv_heads, 1)
        for t, a, b in self._spans(seqs, attn):
            Kt, Vt = K[a:b, :, 0].transpose(1, 0, 2), V[a:b, :, 0].transpose(1, 0, 2)  # [G, b-a, D]
            S = self.capped(scale * (Q[t] @ Kt.transpose(0, 2, 1)), attn.softcap)
            P = xp.exp(S - L[t])
            dP = dO[t] @ Vt.transpose(0, 2, 1)
            dS = scale * P * (dP - (dO[t] * O[t]).sum(axis=-1, keepdims=True))
            if attn.softcap:
                dS = dS * (1 - (S / S.dtype.type(attn.softcap)) ** 2)
            dQ[t] = dS @ Kt
            dK[a:b, :, 0] += (dS.transpose(0, 2, 1) @ Q[t]).transpose(1, 0, 2)
            dV[a:b, :, 0] += (P.transpose(0, 2, 1) @ dO[t]).transpose(1, 0, 2)
        return as_dtype(dq, dtype), as_dtype(dk, dtype), as_dtype(dv, dtype)

    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> Array:
        """gate sigmoid(gate) up (Shazeer 2020)."""
        return as_dtype(gate * self._sigmoid(gate) * up, dtype)

    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[Array, Array]:
        """dgate = dy up σ (1 + gate (1 - σ)), dup = dy gate σ; 1 - σ(gate) is taken as σ(-gate)."""
        sigma = self._sigmoid(gate)
        dgate = dy * up * sigma * (1 + gate * self._sigmoid(-gate))
        return as_dtype(dgate, dtype), as_dtype(dy * gate * sigma, dtype)

    def embedding_forward(self, ids: Array, W: Array) -> Array:
        """y[i] = W[ids[i]]; W [vocab, k]. RangeError for an id outside of it."""
        W = values_of(W)
        _in_range("token id", ids, W.shape[0])
        return W[ids]

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> Array:
        """dW [rows, k]: each dy[i] added to row ids[i], in the order of i."""
        _in_range("token id", ids, rows)
        dW = self.xp.zeros((rows, dy.shape[1]), dy.dtype)
        self.xp.add.at(dW, ids, dy)
        return dW

    # ---- loss and optimizer -------------------------------------------------------------------

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        """nll[i] = lse[i] - logits[i, labels[i]], 0 where the label is IGNORE. Returns nll, lse."""
        _in_range("label", labels[labels != IGNORE], logits.shape[1])
        xp, top = self.xp, logits.real.max(axis=1)
        lse = top + xp.log(xp.exp(logits - top[:, None]).sum(axis=1))
        picked = logits[xp.arange(logits.shape[0]), xp.where(labels == IGNORE, 0, labels)]
        return xp.where(labels == IGNORE, 0, lse - picked).astype(logits.dtype), lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array:
        """dlogits = weight (softmax - onehot), 0 where the label is IGNORE. With `overwrite` the
        caller gives `logits` away and a backend may return the result in it."""
        _in_range("label", labels[labels != IGNORE], logits.shape[1])
        xp, row = self.xp, self.xp.arange(logits.shape[0])
        d = xp.exp(logits - lse[:, None])
        d[row, xp.where(labels == IGNORE, 0, labels)] -= 1
        d = d * weight.astype(logits.dtype)[:, None]
        return xp.where((labels == IGNORE)[:, None], logits.dtype.type(0), d)

    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[Array, Array, Array]:
        """Both at once: nll, lse, dlogits."""
        nll, lse = self.cross_entropy_forward(logits, labels)
        return nll, lse, self.cross_entropy_backward(logits, labels, lse, weight, overwrite)

    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None:
        """One step of AdamW (Loshchilov & Hutter 2019, alg. 2), in place on param, m and v."""
        f = param.dtype.type
        g = grad * f(o.grad_scale)
        m[...] = f(o.beta1) * m + f(1 - o.beta1) * g
        v[...] = f(o.beta2) * v + f(1 - o.beta2) * g * g
        m_hat = m / f(1 - o.beta1**o.step)
        v_hat = v / f(1 - o.beta2**o.step)
        param[...] = param * f(1 - o.lr * o.weight_decay) - f(o.lr) * m_hat / (
            self.xp.sqrt(v_hat) + f(o.eps)
        )

    def sum_squares(self, x: Array) -> float:
        """The sum of x², in float64."""
        return float((x.astype(np.float64) ** 2).sum())

    # ---- random numbers -----------------------------------------------------------------------

    def philox(self, seed: int, stream: int, first: int, n: int) -> Array:
        """Words first .. first+n-1 of a Philox 4x32-10 stream (Salmon et al. 2011), uint32 [n].

        The key is `seed`, block b has the counter (b, stream), word e is word e % 4 of block e//4.
        """
        return philox(seed, stream, first, n, self.xp)

    def dropout(self, x: Array, drop: Drop | None) -> Array:
        """Keeps element e = (row0 + i) k + j iff its Philox word is >= p 2³²; scales by 1/(1-p)."""
        if drop is None or drop.p == 0:
            return x
        words = self.philox(drop.seed, drop.stream, drop.row0 * x.shape[1], x.size)
        keep = words.reshape(x.shape) >= math.floor(float(np.float32(drop.p)) * 2**32)
        scale = x.dtype.type(1) / (x.dtype.type(1) - x.dtype.type(np.float32(drop.p)))
        return self.xp.where(keep, x * scale, x.dtype.type(0))


def values_of(W: Any) -> Array:
    """The values of a weight: an array, or what NumpyBackend.pack made of one."""
    return getattr(W, "values", W)


def _in_range(what: str, index: Array, n: int) -> None:
    """RangeError unless all of `index` is in 0 .. n - 1: a negative index must not wrap around."""
    if bool(((index < 0) | (index >= n)).any()):
        raise RangeError(f"a {what} is outside of 0 .. {n - 1}")
