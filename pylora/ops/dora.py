"""DoRA (Liu et al. 2024) out of a backend's other operations: lengths of rows, forward, backward.

    V = W + s B A,  n = the lengths of V's rows,  f = m / n
    y = residual + f (x Wᵀ + s (x Aᵀ) Bᵀ) + bias

n follows A and B but has no part in the gradient (§4.3 of the paper, and PEFT). V is never made:

    n² = |W|² + 2 s B·(W Aᵀ) + s² B·(B G),  G = A Aᵀ

takes |W|², which is kept with the weight, and products of r rows with W and A. The three terms may
cancel. With S = |W| + |s| Σ_p |B_p| |A_p|, n² is off by γ(k + r) S² at most, so it is trusted where
n² >= S² / 16, which makes n off by 8 γ(k + r) n at most; the other rows, and what is not a number,
are summed plainly in float64. What the weight's precision rounds of A in x Aᵀ is rounded here too:
n is the length of what is multiplied.

With dropout it is PEFT's way: the base's product takes x as it is once, and (f - 1) times drop(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.numbers import lengths
from pylora.ops.protocol import Backend
from pylora.ops.whole import wide
from pylora.types import Array, Drop, LoRA, Projection

_TRUSTED = 16.0  # n² is taken from its three terms where it is at least S² / 16


def factor(lora: LoRA, xp: Any) -> Array:
    """f = m / n [d], rounded once; 1 where both are 0: such a row has nothing to rescale."""
    m: Any = lora.magnitude
    n: Any = lora.norm
    with np.errstate(divide="ignore", invalid="ignore"):
        f = m / n
    return xp.where((n == 0) & (m == 0), f.dtype.type(1), f)


def magnitude_grad(dy: Array, v: Array | None, lora: LoRA, xp: Any) -> Array:
    """dm = Σ_i dy v / n [d]; 0 where n is, since v is zero there, too."""
    n: Any = lora.norm
    with np.errstate(divide="ignore", invalid="ignore"):
        dm = (dy * v).sum(axis=0) / n
    return xp.where(n == 0, dm.dtype.type(0), dm)


def low_rank(lora: LoRA) -> LoRA:
    """The adapter without its magnitude and biases."""
    return LoRA(lora.A, lora.B, lora.scale)


def rescale(
    ops: Backend, v: Array, f: Array, more: Array | None, residual: Array | None, dtype: Any
) -> Array:
    """residual + (f v + more), each operation rounded once, and to `dtype` at the end."""
    y = v * f
    if more is not None:
        y += more
    if residual is not None:
        ops.xp.add(residual, y, out=y)
    return ops.cast(y, dtype)


def _across(ops: Backend, A: Array, W: Any, columns: bool) -> tuple[Array, Array]:
    """A as the weight's precision multiplies it, and A Wᵀ [r, d] in float64."""
    A, narrow = ops.xp.ascontiguousarray(A), ops.activation_dtype(W.precision)
    if not columns:
        A = A if narrow is None else ops.cast(ops.cast(A, narrow), A.dtype)
        return A, ops.lora_forward(A, W)[0].astype(np.float64)
    # An embedding takes A's columns as they are: where `dy W` rounds, it is given A in two parts.
    high = A if narrow is None else ops.cast(ops.cast(A, narrow), A.dtype)
    cross = ops.xp.zeros((A.shape[0], W.shape[1]), np.float64)
    for part in [high] if narrow is None else [high, A - high]:
        cross += ops.lora_backward(part, None, None, W)[0]
    return A, cross


def measured(ops: Any, W: Any, lora: LoRA) -> LoRA:
    """The adapter with its norm, which is computed where it has none."""
    return lora if lora.norm is not None else replace(lora, norm=ops.row_norms(W, lora))


def rescaled(projections: Sequence[Projection]) -> bool:
    """Whether one of them has a magnitude."""
    for p in projections:  # not any(...), whose generator costs more than the comparisons
        if p.lora is not None and p.lora.magnitude is not None:
            return True
    return False


class Dora:
    """`row_squares`, `row_norms`, `dora_forward` and `dora_backward` for any backend."""

    def row_squares(self: Backend, W: Any, columns: bool = False) -> Array:
        """|W|² of each row of a packed weight's values, or of each column, float64: the same bits
        on every backend."""
        values = self.to_numpy(self.unpack(W))
        return self.xp.asarray(lengths.row_squares(values.T if columns else values))

    def row_norms(
        self: Backend, W: Any, lora: LoRA, squares: Array | None = None, columns: bool = False
    ) -> Array:
        """n [d], the lengths of the rows of W + s B A, in A's dtype. `squares` is what
        `row_squares` gave for W, if that is known. With `columns` (an embedding) W is [k, d]."""
        xp, A, B = self.xp, lora.A, lora.B
        squares = self.row_squares(W, columns) if squares is None else squares
        if not bool((A != 0).any()) or not bool((B != 0).any()):
            return xp.sqrt(squares).astype(A.dtype)
        s, wide = float(A.dtype.type(lora.scale)), B.astype(np.float64)
        A, cross = _across(self, A, W, columns)
        gram, _ = self.lora_forward(A, self.pack(A.copy()))  # [r, r]
        low, _ = self.lora_forward(xp.ascontiguousarray(B), self.pack(gram))  # [d, r]
        with np.errstate(over="ignore", invalid="ignore"):
            total = squares + 2 * s * xp.einsum("dp,pd->d", wide, cross)
            total = total + s * s * xp.einsum("dp,dp->d", wide, low.astype(np.float64))
            each = xp.sqrt(xp.diagonal(gram).astype(np.float64))
            most = xp.sqrt(squares) + abs(s) * xp.einsum("dp,p->d", abs(wide), each)
            unsure = self.to_numpy(~(total * _TRUSTED >= most * most))  # NaN is unsure, too
            if unsure.any():
                values = self.to_numpy(self.unpack(W))
                rows = values.T[unsure] if columns else values[unsure]
                host = self.to_numpy(total).copy()
                host[unsure] = lengths.row_squares(
                    rows, self.to_numpy(A), self.to_numpy(B)[unsure], s
                )
                total = xp.asarray(host)
        return xp.sqrt(total).astype(A.dtype)

    def dora_forward(
        self: Backend,
        x: Array,
        W: Any,
        bias: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None, Array]:
        """(y [m,d], h [m,r], v [m,d]): v = drop(x) Vᵀ is what backward needs for the magnitude."""
        low, f = low_rank(lora), factor(measured(self, W, lora), self.xp)
        if drop is None or drop.p == 0:
            v, h = self.lora_forward(x, W, None, low)
            return rescale(self, v, f, bias, residual, dtype), h, v
        full = wide(self, x)
        dropped = self.dropout(full, drop)
        v, h = self.lora_forward(dropped, W, None, low)
        if bool((f == 1).all()):  # plain LoRA, and with B = 0 the base's bits
            y, _ = self.lora_forward(x, W, bias, low, drop, residual, dtype)
            return y, h, v
        rest, _ = self.lora_forward(full - dropped, W)
        more = rest if bias is None else rest + bias
        return rescale(self, v, f, more, residual, dtype), h, v

    def dora_backward(
        self: Backend,
        dy: Array,
        x: Array | None,
        h: Array | None,
        v: Array,
        W: Any,
        lora: LoRA,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array, Array, Array]:
        """(dx, dA, dB, dm): those of plain LoRA for the gradient f dy, and dm = Σ_i dy v / n.
        `v` is forward's; `lora` is the adapter as forward had it, its norm included."""
        low, f = low_rank(lora), factor(lora, self.xp)
        dy = wide(self, dy)
        dm = magnitude_grad(dy, v, lora, self.xp)
        dv = dy * f
        if drop is None or drop.p == 0:
            dx, dA, dB = self.lora_backward(dv, x, h, W, low, add=add, need_dx=need_dx, dtype=dtype)
            return dx, dA, dB, dm
        dropped = self.dropout(wide(self, x), drop)
        _, dA, dB = self.lora_backward(dv, dropped, h, None, low, need_dx=False)
        if not need_dx:
            return None, dA, dB, dm
        straight: Any = self.lora_backward(dy, None, None, W)[0]
        through: Any
        through, _, _ = self.lora_backward(dv, None, h, W, low, need_dA=False, need_dB=False)
        dx = straight + self.dropout(through - straight, drop)
        return (self.cast(dx, dtype) if add is None else add + dx), dA, dB, dm
