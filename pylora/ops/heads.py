"""Norms of q and k, forward and backward: of each head with one weight, of the whole projection, or
of each head with a weight of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pylora.types import Array, Norm

# How q_norm and k_norm are meant: one weight [head_dim] for all heads (Qwen3, Gemma 3); one norm of
# the whole projection (OLMo 2); a norm for each head, whose weights follow each other (StableLM).
HEADS = ("shared", "whole", "each")


def norm_heads(ops: Any, x: Array, norm: Norm, head_dim: int, how: str) -> tuple[Array, Array]:
    """x [m, heads * head_dim] normed, and rstd: of each head, row by row; or of each row."""
    if how != "each":
        y, rstd = ops.norm_forward(_rows(ops, x, head_dim, how), norm)
        return y.reshape(x.shape), rstd
    parts = [ops.norm_forward(one, own) for one, own in _apart(ops, norm, head_dim, x)]
    xp = ops.xp
    y = xp.concatenate([y for y, _ in parts], axis=1)
    return y, xp.stack([rstd for _, rstd in parts], axis=1)


def norm_heads_backward(
    ops: Any, dy: Array, x: Array, norm: Norm, rstd: Array, head_dim: int, how: str
) -> Array:
    """dx of `norm_heads`."""
    if how != "each":
        rows = (_rows(ops, a, head_dim, how) for a in (dy, x))
        dx: Array = ops.norm_backward(*rows, norm, rstd)
        return dx.reshape(x.shape)
    xp, parts = ops.xp, []
    for h, ((one, own), (d, _)) in enumerate(
        zip(_apart(ops, norm, head_dim, x), _apart(ops, norm, head_dim, dy), strict=True)
    ):
        parts.append(ops.norm_backward(d, one, own, xp.ascontiguousarray(rstd[:, h])))
    dx = xp.concatenate(parts, axis=1)
    return dx


def _rows(ops: Any, x: Array, head_dim: int, how: str) -> Array:
    return x if how == "whole" else ops.xp.ascontiguousarray(x).reshape(-1, head_dim)


def _apart(ops: Any, norm: Norm, head_dim: int, x: Array) -> list[tuple[Array, Norm]]:
    """Each head's columns, and its norm."""
    out = []
    for first in range(0, x.shape[1], head_dim):
        one = slice(first, first + head_dim)
        own = replace(norm, w=norm.w[one], b=None if norm.b is None else norm.b[one])
        out.append((ops.xp.ascontiguousarray(x[:, one]), own))
    return out
