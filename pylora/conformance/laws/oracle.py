"""The exact results that laws compare with: the formulas, in wide arithmetic, nothing else.

float64 for float32 and bfloat16 inputs, `numpy.longdouble` for float64; the error of that is part
of each bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.conformance.bounds.layer import wide
from pylora.conformance.tracing import formula
from pylora.types import Array

Triple = tuple[Array, Array, float]


@formula
def forward(x: Array, W: Array, adapters: Sequence[Triple], bias: Array | None = None) -> Array:
    """y = x Wᵀ + bias + sum of s (x Aᵀ) Bᵀ (spec F-1, X-1)."""
    X = wide(x)
    y = X @ wide(W).T
    if bias is not None:
        y = y + wide(bias)
    for A, B, s in adapters:
        y = y + s * ((X @ wide(A).T) @ wide(B).T)
    return y


@formula
def backward(
    dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
) -> tuple[Array, Array, Array]:
    """dx = dy W + s (dy B) A; dA = s (dy B)ᵀ x; dB = s dyᵀ (x Aᵀ) (spec B-1)."""
    D, X, Aw, Bw = wide(dy), wide(x), wide(A), wide(B)
    g = D @ Bw
    return D @ wide(W) + scale * (g @ Aw), scale * (g.T @ X), scale * (D.T @ (X @ Aw.T))


@formula
def merged(W: Array, A: Array, B: Array, scale: float) -> Array:
    """W + s B A (spec M-1), not rounded."""
    return wide(W) + scale * (wide(B) @ wide(A))


@formula
def mixed(
    x: Array, W: Array, adapters: Sequence[Triple], rows: Array, bias: Array | None = None
) -> Array:
    """Row i with adapters[rows[i]], or the base alone for -1 (spec X-3)."""
    y = forward(x, W, [], bias)
    for row in np.unique(rows[rows >= 0]):
        mine = np.flatnonzero(rows == row)
        y[mine] = forward(x[mine], W, [adapters[int(row)]], bias)
    return y


@formula
def dropped(
    dy: Array, x: Array, mask: Array, W: Array, A: Array, B: Array, scale: float
) -> tuple[Array, Array, Array, Array]:
    """y, dx, dA, dB where the input of A is multiplied by `mask` [m,k] (0 or 1 / (1 - p))."""
    D, X, M, Aw, Bw = wide(dy), wide(x), np.asarray(mask, np.float64), wide(A), wide(B)
    g, h = D @ Bw, (X * M) @ Aw.T
    y = X @ wide(W).T + scale * (h @ Bw.T)
    dx = D @ wide(W) + scale * M * (g @ Aw)
    return y, dx, scale * (g.T @ (X * M)), scale * (D.T @ h)


@formula
def loss_gradients(
    batches: Sequence[tuple[Array, Array, Array]], W: Array, A: Array, B: Array, scale: float
) -> tuple[Array, Array]:
    """dA, dB of the mean over all counted rows of |y - target|² / 2 (spec O-1)."""
    x = np.concatenate([b[0] for b in batches])
    target = np.concatenate([b[1] for b in batches])
    counted = np.concatenate([b[2] for b in batches]).astype(bool)
    y = forward(x, W, [(A, B, scale)])
    dy = (y - wide(target)) * (counted / max(1, int(counted.sum())))[:, None]
    g = dy @ wide(B)
    return scale * (g.T @ wide(x)), scale * (dy.T @ (wide(x) @ wide(A).T))
