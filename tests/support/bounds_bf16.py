"""Tolerances where bfloat16 takes part: the float32 bounds at moved inputs, and what the moves do.

u = 2^-8 is the unit roundoff of bfloat16. A product of factors of which n are rounded to it moves
by at most (1 + u)^n - 1 of itself (Higham, lemma 3.1), and its float32 rounding is that of the
moved factors. A result stored in bfloat16 is rounded once more. Inputs and products below the
normal numbers may be taken as zero.
"""

from __future__ import annotations

from typing import Any

import bounds
import numpy as np

from pylora.conformance.bounds.ops import _each_query
from pylora.types import Attn, LoRA, Seqs

U = bounds.unit("bf16")
TINY = bounds.tiny()


def _abs(a: Any) -> np.ndarray:
    return np.abs(np.asarray(a, np.float64))


def _floor(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """Of X [m,n] Y [n,p], magnitudes: an input lost takes the other factor with it, a product or a
    sum is lost itself."""
    return TINY * (X.sum(axis=1)[:, None] + Y.sum(axis=0)[None, :] + 2 * X.shape[1] + 2)


def moved(n: int) -> float:
    """The most that n roundings to bfloat16 move a product by."""
    return float((1 + U) ** n - 1)


def stored(bound: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Of a result that is within `bound` of `value` before it is rounded to bfloat16."""
    return bound + U * (_abs(value) + bound) + TINY


def lora_forward(
    x: Any, W: Any, bias: Any, lora: LoRA, residual: Any, p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of y and h: x is rounded in x Wᵀ; x and A are in h = x Aᵀ. W is bfloat16 already."""
    X, Wt, At, Bt = _abs(x), _abs(W).T, _abs(lora.A).T, _abs(lora.B).T
    low = X @ At / (1 - p)
    big = LoRA(lora.A * (1 + U), lora.B, lora.scale)
    y, h = bounds.lora_forward(X * (1 + U), W, bias, big, residual, p=p)
    y = y + moved(1) * (X @ Wt) + moved(2) * abs(lora.scale) * (low @ Bt)
    y = y + _floor(X, Wt) + abs(lora.scale) * (_floor(X, At) @ Bt + _floor(low, Bt))
    return y, h + moved(2) * low + _floor(X, At)


def lora_backward(
    dy: Any, x: Any, h: Any, W: Any, lora: LoRA, p: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of dx, dA, dB: dy is rounded in dy W; dy and B are in g = dy B; dy in dB and x in dA once."""
    D, X, A, B, s = _abs(dy), _abs(x), _abs(lora.A), _abs(lora.B), abs(lora.scale)
    big = LoRA(lora.A, lora.B * (1 + U), lora.scale)
    dx, dA, dB = bounds.lora_backward(D * (1 + U), X * (1 + U), h, W, big, None, p=p)
    g, low = D @ B, _floor(D, B)
    dx = dx + moved(1) * (D @ _abs(W)) + moved(2) * s * (g @ A) / (1 - p)
    dx = dx + _floor(D, _abs(W)) + s * (low @ A + _floor(g, A)) / (1 - p)
    dA = dA + moved(3) * s * g.T @ X / (1 - p) + s * (low.T @ X + _floor(g.T, X)) / (1 - p)
    return dx, dA, dB + moved(1) * s * D.T @ _abs(h) + s * _floor(D.T, _abs(h))


def attention_forward(
    q: Any, k: Any, v: Any, seqs: Seqs, attn: Attn
) -> tuple[np.ndarray, np.ndarray]:
    """Of o and lse, beside bounds.attention_forward: P is rounded for P V."""
    o = np.zeros(q.shape)
    for t, _, S, _, Vt, _, out in _each_query(q, k, v, seqs, attn):
        P = np.exp(S - S.max())
        o[t, out] = 1.01 * moved(1) * (P / P.sum()) @ np.abs(Vt)
    return o, np.zeros((q.shape[0], attn.heads))


def attention_backward(
    do: Any, q: Any, k: Any, v: Any, o: Any, lse: Any, seqs: Seqs, attn: Attn
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of dq, dk, dv, beside bounds.attention_backward: do is rounded, in dP and sum do o, and P
    and dS are in the products after."""
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for t, h, S, _, Vt, (a, b, Kt, kv), out in _each_query(q, k, v, seqs, attn):
        P = moved(2) * np.exp(S - lse[t, h])
        g = _abs(do[t, out])
        M = P * (np.abs(Vt) @ g + g @ _abs(o[t, out])) * attn.scale
        dq[t, out] = M @ np.abs(Kt)
        dk[a:b, kv] += M[:, None] * _abs(q[t, out])
        dv[a:b, kv] += P[:, None] * g
    return dq * 1.01, dk * 1.01, dv * 1.01
