"""Gradients of the base's own weights, out of a backend's other operations.

    y = x Wᵀ + b:          dW = dyᵀ x [d,k],  db = Σ_i dy_i
    y = n w + b (a norm):  dw = Σ_i dy_i n_i,  n = x rstd, of a LayerNorm (x - mean x) rstd

A frozen weight needs none of these; what an adapter trains whole (PEFT's modules_to_save) does. The
product is one with x as the weight, so its bits do not depend on the number of threads. It is taken
in float32 at least, whatever the precision of W.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.ops.protocol import Backend
from pylora.types import Array, Norm


def wide(ops: Backend, x: Array) -> Array:
    """float32 of a 16-bit array; any other as it is."""
    return ops.cast(x, np.float32) if x.dtype.itemsize == 2 else x


def weight_grad(ops: Backend, dy: Array, x: Array, add: Array | None = None) -> Array:
    """add + dyᵀ x [d,k]; dy [m,d], x [m,k]."""
    dy, x = wide(ops, dy), wide(ops, x)
    if x.shape[0] == 0:
        return ops.zeros((dy.shape[1], x.shape[1]), dy.dtype) if add is None else add
    turned = ops.xp.ascontiguousarray(dy.T)
    return ops.lora_forward(turned, ops.pack(ops.xp.ascontiguousarray(x.T)), residual=add)[0]


def norm_grads(
    ops: Backend, dy: Array, x: Array, norm: Norm, rstd: Array
) -> tuple[Array, Array | None]:
    """(dw, db) of a norm [k]; no db where it has no b. dy, x [m,k], rstd [m]."""
    dy, x = wide(ops, dy), wide(ops, x)
    n: Any = x - x.mean(axis=1)[:, None] if norm.kind == "layer" else x
    dw = (dy * (n * rstd[:, None])).sum(axis=0)
    return dw, None if norm.b is None else dy.sum(axis=0)


def head_norm_grads(
    ops: Backend, dy: Array, x: Array, norm: Norm, rstd: Array, head_dim: int, how: str
) -> Array:
    """dw of the norms of q's or k's heads, shaped like norm.w; see `norm_heads` for `how`."""
    if how == "whole":
        return norm_grads(ops, dy, x, norm, rstd)[0]
    xp = ops.xp
    if how == "shared":
        dy, x = (xp.ascontiguousarray(a).reshape(-1, head_dim) for a in (dy, x))
        return norm_grads(ops, dy, x, norm, rstd)[0]
    parts = []
    for h, first in enumerate(range(0, x.shape[1], head_dim)):
        one = slice(first, first + head_dim)
        parts.append(norm_grads(ops, dy[:, one], x[:, one], norm, rstd[:, h])[0])
    dw: Array = xp.concatenate(parts)
    return dw
