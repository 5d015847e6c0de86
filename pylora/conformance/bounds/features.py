"""Tolerances of the operations that families add to Llama's, by the rules of bounds/ops.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds.ops import EXP, gamma, tiny
from pylora.types import Array

# tanh by exp: 1 - e where e is at most 0.61 (so at least 0.39), a sum and a quotient; its argument
# brings what it is off by, as z tanh'(z) <= tanh(z).
TANH = 3 * EXP + 12
ERF = 16  # the C library's erf, within a few ulp, and what is multiplied with it


def _wide(x: Array) -> Array:
    return np.asarray(x, np.float64)


def _sigmoid(x: Array) -> Array:
    e = np.exp(-abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def _centred(x: Array, dtype: Any) -> tuple[Array, Array]:
    """x - mean(x), and what it is off by: the mean by gamma_K of the mean magnitude."""
    x = _wide(x)
    off = gamma(x.shape[1] + 2, dtype) * (abs(x) + abs(x).mean(axis=1, keepdims=True))
    return x - x.mean(axis=1, keepdims=True), off


def layer_norm_forward(
    x: Array, w: Array, b: Array | None, eps: float, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of y and rstd. The variance is off by 2 |c| δ + δ² on average, besides its own sum; 1/sqrt
    halves that, to first order; a factor of 1.1 covers the rest while that is below a tenth."""
    c, off = _centred(x, dtype)
    var = (c * c).mean(axis=1) + eps
    moved = (2 * abs(c) * off + off * off).mean(axis=1) / var
    relative = np.where(moved < 0.1, 1.1 * moved / 2, 4.0) + gamma(x.shape[1] / 2 + 6, dtype)
    r = 1 / np.sqrt(var)
    bias = 0 if b is None else abs(_wide(b))
    y = abs(_wide(w)) * r[:, None] * (off + abs(c) * relative[:, None])
    size = abs(c) * r[:, None] * abs(_wide(w)) + bias
    return y + gamma(5, dtype) * size, relative * r


def layer_norm_backward(
    dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None, dtype: Any = np.float32
) -> Array:
    """Of dx, rstd being an exact input: sums of K terms, and n = c rstd off as c is."""
    c, off = _centred(x, dtype)
    r, g = abs(_wide(rstd))[:, None], abs(_wide(dy)) * abs(_wide(w))
    n, dn = abs(c) * r, off * r

    def mean(a: Array) -> Array:
        return a.mean(axis=1, keepdims=True)

    size = r * (g + mean(g) + n * mean(g * n))
    size = size if add is None else size + abs(_wide(add))
    through = r * (dn * mean(g * (n + dn)) + n * mean(g * dn))
    return gamma(x.shape[1] + 12, dtype) * size + 1.1 * through


def _act(x: Array, kind: str, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """Magnitudes of act(x) and of the terms of act'(x), and what each is off by, relatively."""
    x = _wide(x)
    if kind == "relu2":
        r = np.maximum(x, 0)
        return r * r, 2 * r, gamma(2, dtype) + 0 * x, gamma(2, dtype) + 0 * x
    if kind == "gelu_erf":
        below = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in x.ravel()]).reshape(x.shape)
        slope = below + abs(x) * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        off = gamma(ERF, dtype) * (1 + x * x)
        return abs(x) * below, slope, off, off + gamma(EXP + 4, dtype)
    c, d = 2 * math.sqrt(2 / math.pi), 0.044715
    u = x if kind == "silu" else c * (x + d * x**3)
    du = 1 + 0 * x if kind == "silu" else c * (1 + 3 * d * x * x)
    s = _sigmoid(u)
    off = gamma(EXP + 5, dtype) + gamma(8, dtype) * abs(u)  # sigma'(u) / sigma(u) <= 1
    slope = s * (1 + abs(x) * _sigmoid(-u) * du)
    return abs(x) * s, slope, off, 2 * off + gamma(12, dtype)


def activation_forward(x: Array, up: Array | None, kind: str, dtype: Any = np.float32) -> Array:
    y, _, off, _ = _act(x, kind, dtype)
    U = 1.0 if up is None else abs(_wide(up))
    return (off + gamma(2, dtype)) * y * U + tiny(dtype) * (1 + abs(_wide(x))) * (1 + U)


def activation_backward(
    dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of dx and dup; without up the second says nothing."""
    y, slope, off, more = _act(x, kind, dtype)
    D, U = abs(_wide(dy)), 1.0 if up is None else abs(_wide(up))
    floor = tiny(dtype) * (1 + abs(_wide(x))) ** 3 * (1 + D) * (1 + U)
    dx = (more + gamma(4, dtype)) * D * U * slope + floor
    return dx, (off + gamma(2, dtype)) * D * y + floor


def soft_cap_forward(x: Array, multiplier: float, cap: float, dtype: Any = np.float32) -> Array:
    s = multiplier * _wide(x)
    if not cap:
        return gamma(2, dtype) * abs(s)
    return gamma(TANH + 4, dtype) * abs(cap * np.tanh(s / cap)) + tiny(dtype)


def soft_cap_backward(
    dy: Array, y: Array, multiplier: float, cap: float, dtype: Any = np.float32
) -> Array:
    return gamma(10, dtype) * abs(_wide(dy)) * abs(multiplier)


def choose(
    logits: Array, weights: Array, normalize: bool, dtype: Any = np.float32
) -> tuple[Array, Array]:
    """Of the probabilities and of the chosen weights: a difference of two logits is off by u, what
    that does to an exponential is its factor; sums of n and of k positive terms; quotients."""
    x = _wide(logits)
    apart = x.max(axis=1, keepdims=True) - x
    p = np.exp(-apart) / np.exp(-apart).sum(axis=1, keepdims=True)
    off = gamma(x.shape[1] + 2 * EXP + 3, dtype) + gamma(2, dtype) * apart.max(initial=0.0)
    w = _wide(weights)
    more = 2 * off + gamma(w.shape[1] + 2, dtype) if normalize else off
    return off * p + tiny(dtype), more * w + tiny(dtype)


def choose_backward(
    dw: Array, probabilities: Array, chosen: Array, normalize: bool, dtype: Any = np.float32
) -> Array:
    """Of dlogits = p (dp - sum(dp p)), p and the weights being one's own: each is off by its bound
    relatively, four of them meet in a term; sums of n and k terms, twice."""
    p, g = _wide(probabilities), abs(_wide(dw))
    rows = np.arange(p.shape[0])[:, None]
    if normalize:
        total = p[rows, chosen].sum(axis=1, keepdims=True)
        g = (g + (g * p[rows, chosen] / total).sum(axis=1, keepdims=True)) / total
    dp = np.zeros_like(p)
    dp[rows, chosen] = g
    n, k = p.shape[1], g.shape[1]
    apart = np.log(p.max(axis=1, keepdims=True) / np.maximum(p, 1e-300)).max(initial=0.0)
    off = gamma(n + 2 * EXP + 3, dtype) + gamma(2, dtype) * apart
    size = p * (dp + (dp * p).sum(axis=1, keepdims=True))
    return (4 * off + gamma(2 * n + 2 * k + 12, dtype)) * size + tiny(dtype)
