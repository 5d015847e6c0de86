"""The backward of a norm whose own weight may be trained: its gradient goes to its tensors."""

from __future__ import annotations

import math

from pylora.model.linear import Grads, LoRAGrad, add_grad
from pylora.ops.heads import norm_heads_backward
from pylora.ops.protocol import Backend
from pylora.ops.whole import head_norm_grads, norm_grads
from pylora.types import Array, Norm


def trains(norm: Norm | None) -> bool:
    """Whether backward has a gradient to compute for the norm itself."""
    return norm is not None and bool(norm.trained)


def through_norm(
    ops: Backend,
    dy: Array,
    x: Array,
    norm: Norm,
    rstd: Array,
    grads: Grads,
    add: Array | None = None,
) -> Array:
    """dx of a norm of rows, plus `add`, which is given away; what it trains goes into `grads`."""
    if norm.trained:
        _put(norm, *norm_grads(ops, dy, x, norm, rstd), grads)
    return ops.norm_backward(dy, x, norm, rstd, add)


def through_heads(
    ops: Backend,
    dy: Array,
    x: Array,
    norm: Norm,
    rstd: Array,
    head_dim: int,
    how: str,
    grads: Grads,
) -> Array:
    """dx of `norm_heads`."""
    if norm.trained:
        _put(norm, head_norm_grads(ops, dy, x, norm, rstd, head_dim, how), None, grads)
    return norm_heads_backward(ops, dy, x, norm, rstd, head_dim, how)


def _put(norm: Norm, dw: Array, db: Array | None, grads: Grads) -> None:
    """Cuts the gradient into those of the norm's tensors, in their order."""
    at = 0
    found: dict[str, LoRAGrad] = {}
    for name, shape in norm.trained:
        path, _, part = name.rpartition(".")
        grad = found.setdefault(path, LoRAGrad(None, None))
        if part == "bias":
            grad.bias = db
            continue
        size = math.prod(shape)
        grad.weight = dw[at : at + size].reshape(shape)
        at += size
    for path, grad in found.items():
        add_grad(grads, path, grad)
