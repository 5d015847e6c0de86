"""Projections that a family stores as one: how q, k and v, or gate and up, lie in its output."""

from __future__ import annotations

from typing import Any

from pylora.types import Array, Attn


def split_qkv(y: Array, how: str, attn: Attn) -> tuple[Array, Array, Array]:
    """The output [m, q + k + v] of one projection -> q, k, v. Views where the layout allows it."""
    D, H, G = attn.head_dim, attn.heads, attn.kv_heads
    if how == "blocks":
        return y[:, : H * D], y[:, H * D : (H + G) * D], y[:, (H + G) * D :]
    m, each = y.shape[0], H // G
    groups = y.reshape(m, G, each + 2, D)
    q, k, v = groups[:, :, :each], groups[:, :, each], groups[:, :, each + 1]
    return q.reshape(m, H * D), k.reshape(m, G * D), v.reshape(m, G * D)


def join_qkv(q: Array, k: Array, v: Array, how: str, attn: Attn, xp: Any) -> Array:
    """The inverse of `split_qkv`, for gradients; a copy."""
    if how == "blocks":
        out: Array = xp.concatenate([q, k, v], axis=1)
        return out
    D, H, G = attn.head_dim, attn.heads, attn.kv_heads
    m, each = q.shape[0], H // G
    parts = [q.reshape(m, G, each, D), k.reshape(m, G, 1, D), v.reshape(m, G, 1, D)]
    joined: Array = xp.concatenate(parts, axis=2).reshape(m, (H + 2 * G) * D)
    return joined


def split_gate_up(y: Array) -> tuple[Array, Array]:
    """The output [m, 2 n] -> gate and up, views."""
    n = y.shape[1] // 2
    return y[:, :n], y[:, n:]
