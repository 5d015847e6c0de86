"""Bounds of mixed batches' gradients, of biases of B, and of embeddings, made of layer.py's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer
from pylora.conformance.bounds.layer import STORED, chain, ends, kind, relative, smallest
from pylora.types import Array


def _abs(a: Any) -> Array:
    return np.abs(layer.wide(np.asarray(a)))


def without_adapter(dy: Array, W: Array, precision: str = "fp32") -> Array:
    """Of dx = dy W: gradients of an adapter of no ranks."""
    d, k = W.shape
    none = np.zeros((0, k), W.dtype), np.zeros((d, 0), W.dtype)
    return layer.backward(dy, np.zeros((len(dy), k), W.dtype), W, *none, 1.0, precision=precision)[
        0
    ]


def biased(
    x: Array,
    W: Array,
    adapters: Sequence[tuple[Array, Array, Array | None, float]],
    bias: Array | None = None,
    precision: str = "fp32",
) -> Array:
    """Of y with adapters (A, B, bias_B, scale): the scaled bias is one term more of each sum, and
    3 roundings: the scale, its product with the bias, the sum with the base's."""
    dtype, plain = kind(x), [(A, B, s) for A, B, _, s in adapters]
    extra = 3 * len(adapters)
    bound = layer.forward(x, W, plain, bias, extra, precision)
    n = x.shape[1] + sum(A.shape[0] for A, _, _ in plain) + 8 + len(adapters) + extra
    size = _abs(x) @ _abs(W).T
    for A, B, more, s in adapters:
        size = size + abs(float(s)) * (_abs(x) @ _abs(A).T @ _abs(B).T)
        if more is not None:
            term = abs(float(s)) * _abs(more)
            size = size + term
            bound = bound + relative(n, dtype, STORED["forward"] + len(adapters)) * term
            bound = bound + 2 * smallest(dtype) * (1 + abs(float(s)))
    return ends(bound, size + (0.0 if bias is None else _abs(bias)), dtype)


def bias_gradient(dy: Array, scale: float) -> Array:
    """Of s times the sum of the rows of dy."""
    s = abs(float(scale))
    size = s * _abs(dy).sum(axis=0)
    off = relative(len(dy) + 3, kind(dy), STORED["gradient"]) * size
    off = off + (len(dy) + 1) * smallest(kind(dy)) * (1 + s)
    return ends(off, np.maximum(size, _abs(dy).sum(axis=0)), kind(dy))


def merged_bias(bias: Array | None, more: Array, scale: float) -> Array:
    """Of bias + s bias_B: 3 roundings, and that of the dtype."""
    s, dtype = abs(float(scale)), kind(more)
    size = s * _abs(more) + (0.0 if bias is None else _abs(bias))
    off = relative(4, dtype, 2) * size + smallest(dtype) * (2 + s)
    return ends(off, np.maximum(size, _abs(more)), dtype)


def embedding(ids: Array, W: Array, A: Array, B: Array, scale: float) -> Array:
    """Of y[i] = W[ids[i]] + s A[:, ids[i]]ᵀ Bᵀ: a sum over the ranks and 5 roundings."""
    dtype, s = kind(W), abs(float(scale))
    h = np.ascontiguousarray(_abs(A)[:, ids].T)
    one = np.eye(A.shape[0])
    update, low = chain(h, one, _abs(B).T, scale, dtype)
    size = _abs(W)[ids] + update
    n = A.shape[0] + 5
    return ends(relative(n, dtype, STORED["forward"]) * size + low * (1 + s), size, dtype)


def embedding_backward(
    dy: Array, ids: Array, A: Array, B: Array, scale: float
) -> tuple[Array, Array]:
    """Of dA, a sum over hidden and over the token's rows, and dB, over all rows."""
    dtype, s = kind(dy), abs(float(scale))
    D, stored = _abs(dy), STORED["gradient"]
    g = s * (D @ _abs(B))
    low = smallest(dtype) * (1 + s) * (2 + D.sum(axis=1)[:, None] + _abs(B).sum(axis=0)[None, :])
    size, floor = (np.zeros((A.shape[1], A.shape[0])) for _ in range(2))
    np.add.at(size, ids, g.astype(np.float64))
    np.add.at(floor, ids, (low * D.shape[1]).astype(np.float64))
    n = D.shape[1] + len(ids) + 5
    dA = ends(relative(n, dtype, stored) * size + floor, size, dtype)
    h = _abs(A)[:, ids].T
    into_B = s * (D.T @ h)
    floor_B = smallest(dtype) * (1 + s) * (2 + D.sum(axis=0)[:, None] + h.sum(axis=0)[None, :])
    dB = relative(len(ids) + 5, dtype, stored) * into_B + floor_B * (1 + len(ids))
    return dA.T, ends(dB, into_B, dtype)
