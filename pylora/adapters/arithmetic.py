"""Task arithmetic on arrays: what `pylora.adapters.combine` does to each module's tensors.

Each function takes the same tensor of several tasks and a weight for each, and gives their
combination in float64. Methods, names and order of operations are those of PEFT's
`add_weighted_adapter`: task arithmetic (Ilharco et al., arXiv:2212.04089), TIES (Yadav et al.,
arXiv:2306.01708), DARE (Yu et al., arXiv:2311.03099). Knows neither adapters nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.numbers import random

Array = np.ndarray[Any, Any]


def prune_small(tensor: Array, density: float) -> Array:
    """The int(density * size) elements of largest magnitude, others 0; of equals the first."""
    flat = np.asarray(tensor, np.float64).reshape(-1)
    kept = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    shaped: Array = out.reshape(tensor.shape)
    return shaped


def drop_random(tensor: Array, density: float, *, seed: int, stream: int) -> Array:
    """Each element stays with probability `density` and is divided by it, else it is 0.

    Element i, in C order, is kept where the i-th number of the stream is below `density`.
    """
    kept = random.unit(seed, stream, 0, tensor.size).reshape(tensor.shape) < density
    out: Array = np.where(kept, np.asarray(tensor, np.float64) / density, 0.0)
    return out


def weighted_sum(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """sum_i weights[i] tensors[i]."""
    total = np.zeros(tensors[0].shape)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += np.asarray(tensor, np.float64) * weight
    return total


def elected(tensors: Sequence[Array], weights: Sequence[float], *, by_count: bool) -> Array:
    """TIES: the weighted mean, at each place, of those whose sign the majority has.

    The majority's sign is that of the plain sum (`by_count`: of the sum of signs), + where that is
    0. The weighted values that agree are summed and divided by how many they are.
    """
    stack = np.stack([np.asarray(t, np.float64) for t in tensors])
    signs = np.sign(stack)
    majority = np.where((signs if by_count else stack).sum(axis=0) >= 0, 1.0, -1.0)
    agree = signs == majority
    factor = np.asarray(weights, np.float64).reshape(-1, *[1] * (stack.ndim - 1))
    total: Array = (stack * factor * agree).sum(axis=0)
    total /= np.maximum(agree.sum(axis=0), 1)
    return total


def truncated(A: Array, B: Array, rank: int) -> tuple[Array, Array, float, float]:
    """The best product of this rank for B A: (A' [rank, k], B' [d, rank], lost, whole).

    A [r, k], B [d, r]; with B A = U S Vᵀ, A' is the first part of Vᵀ and B' that of U S (Eckart and
    Young). `lost` is the Frobenius norm of the rest, `whole` that of B A. Where the product has
    fewer than `rank` singular values the rest of A' and B' is 0. Nothing of size d x k is made: the
    values are those of a matrix of r x r.
    """
    left, inner = np.linalg.qr(np.asarray(B, np.float64))
    right, outer = np.linalg.qr(np.asarray(A, np.float64).T)
    u, s, vt = np.linalg.svd(inner @ outer.T, full_matrices=False)
    return _cut(left @ u, s, vt @ right.T, rank)


def factored(delta: Array, rank: int) -> tuple[Array, Array, float, float]:
    """`truncated` for a matrix [d, k] that is given whole."""
    return _cut(*np.linalg.svd(np.asarray(delta, np.float64), full_matrices=False), rank)


def _cut(u: Array, s: Array, vt: Array, rank: int) -> tuple[Array, Array, float, float]:
    n = min(rank, s.size)
    A, B = np.zeros((rank, vt.shape[1])), np.zeros((u.shape[0], rank))
    A[:n], B[:, :n] = vt[:n], u[:, :n] * s[:n]
    return A, B, float(np.linalg.norm(s[rank:])), float(np.linalg.norm(s))
