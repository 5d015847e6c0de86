"""How far a correct DoRA may be off: lengths, forward, backward, merging (spec W-1 to W-6).

A length n of V = W + s B A may be had from V or from W's length and products with A; either way it
is off by at most gamma_{k+r+6} S² / n for S = |W| + |s| Σ_p |B_p| |A_p|, the lengths of a row: the
sum of squares of V is off by 2 gamma_{r+2} S n through V and by gamma_k n² in summing, and the
three terms |W|², 2 s B·(W Aᵀ) and s² B·(B A Aᵀ) by gamma_{k+r+2} S². So f = m / n is off by that
share, and by two roundings. Where rows cancel to nothing the share is large, and says so.
"""

from __future__ import annotations

import numpy as np

from pylora.conformance.bounds import layer
from pylora.conformance.bounds.layer import kind, relative, smallest, wide
from pylora.types import Array


def _abs(a: Array) -> Array:
    return np.abs(wide(np.asarray(a)))


def _lengths(a: Array) -> Array:
    w = wide(np.asarray(a))
    return np.asarray(np.sqrt((w * w).sum(axis=1)))


def share(W: Array, A: Array, B: Array, scale: float) -> tuple[Array, Array]:
    """(n, the share of itself that it may be off by), each [d]; infinite where n is 0 and V is not
    zero term by term."""
    V = wide(W) + float(scale) * (wide(B) @ wide(A))
    n, most = _lengths(V), _lengths(W) + abs(float(scale)) * (_abs(B) @ _lengths(A))
    with np.errstate(divide="ignore", invalid="ignore"):
        off = relative(A.shape[1] + A.shape[0] + 6, kind(W)) * (most / n) ** 2
    return n, np.where(most == 0, 0.0, np.where(n == 0, np.inf, off))


def norm(W: Array, A: Array, B: Array, scale: float) -> Array:
    """Of n [d]."""
    n, off = share(W, A, B, scale)
    bound: Array = (off + relative(3, kind(W))) * n + smallest(kind(W)) ** 0.5
    return bound


def _factor(W: Array, A: Array, B: Array, m: Array, scale: float) -> tuple[Array, Array, Array]:
    """n, |f|, and the share that f may be off by."""
    n, off = share(W, A, B, scale)
    f = np.where(n == 0, 1.0, _abs(m) / np.where(n == 0, 1.0, n))
    off = np.where(off < 0.5, off / (1 - np.minimum(off, 0.5)), np.inf)
    return n, f, off + relative(4, kind(W))


def _size(x: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    return _abs(x) @ _abs(W).T + abs(float(scale)) * (_abs(x) @ _abs(A).T @ _abs(B).T)


def forward(
    x: Array, W: Array, A: Array, B: Array, m: Array, scale: float, bias: Array | None = None
) -> Array:
    """Of y = f (x Wᵀ + s (x Aᵀ) Bᵀ) + bias, [m,d]."""
    _, f, off = _factor(W, A, B, m, scale)
    size = _size(x, W, A, B, scale)
    bound = f * (layer.forward(x, W, [(A, B, scale)]) * (1 + off) + off * size)
    more = 0.0 if bias is None else _abs(bias)
    return np.asarray(bound + relative(3, kind(x)) * (f * size + more) + smallest(kind(x)))


def backward(
    dy: Array, x: Array, W: Array, A: Array, B: Array, m: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """Of dx, dA, dB and dm."""
    n, f, off = _factor(W, A, B, m, scale)
    s, D = abs(float(scale)), _abs(dy) * f
    moved = (D * (1 + off)).astype(x.dtype)
    plain = layer.backward(moved, x, W, A, B, scale)
    E = D * off
    dx = plain[0] + E @ _abs(W) + s * (E @ _abs(B) @ _abs(A))
    dA = plain[1] + s * ((E @ _abs(B)).T @ _abs(x))
    dB = plain[2] + s * (E.T @ (_abs(x) @ _abs(A).T))
    size = _size(x, W, A, B, scale)
    one = layer.forward(x, W, [(A, B, scale)])
    total = (_abs(dy) * (one + (off + relative(x.shape[0] + 4, kind(x))) * size)).sum(axis=0)
    dm = np.where(n == 0, 0.0, total * (1 + off) / np.where(n == 0, 1.0, n)) + smallest(kind(x))
    return dx, dA, dB, np.asarray(dm)


def merged(W: Array, A: Array, B: Array, m: Array, scale: float) -> Array:
    """Of W' = f (W + s B A), [d,k], stored in W's dtype once."""
    _, f, off = _factor(W, A, B, m, scale)
    size = _abs(W) + abs(float(scale)) * (_abs(B) @ _abs(A))
    f, off = f[:, None], off[:, None]
    bound: Array = f * (layer.merged(W, A, B, scale) * (1 + off) + off * size)
    return bound + relative(2, kind(W)) * f * size + smallest(kind(W))
