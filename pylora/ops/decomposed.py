"""DoRA in array notation, a part of `pylora.reference.Reference`: what every other way is held to.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5, with the lengths detached
from the gradient (§4.3), as in PEFT. Letters as there; m is the magnitude [d], n the lengths [d].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.numbers.lengths import row_squares
from pylora.numbers.precision import as_dtype
from pylora.ops.dora import factor, low_rank, magnitude_grad, measured
from pylora.types import Array, Drop, LoRA


class Decomposed:
    """The formulas over the array namespace `xp`."""

    xp: Any
    to_numpy: Any
    _rows: Any
    dropout: Any
    lora_backward: Any

    def row_norms(
        self, W: Array, lora: LoRA, squares: Array | None = None, columns: bool = False
    ) -> Array:
        """n[j] = |row j of W + s B A| [d], in float64, rounded once to the dtype of A.

        With `columns` W is [k,d] and n[j] the length of column j of W + s (B A)ᵀ: an embedding."""
        A, B = lora.A.real, lora.B.real  # n has no part in the gradient, by complex step neither
        s, V = float(A.dtype.type(lora.scale)), self.to_numpy(_values(W).real)
        n2 = row_squares(V.T if columns else V, self.to_numpy(A), self.to_numpy(B), s)
        return self.xp.asarray(np.sqrt(n2)).astype(A.dtype)

    def dora_forward(
        self,
        x: Array,
        W: Array,
        bias: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None, Array]:
        """f = m / n; v = drop(x) Wᵀ + s h Bᵀ [m,d], h = drop(x) Aᵀ; y = residual + f v + bias, and
        with dropout + (x - drop(x)) Wᵀ, so that the base's own part of y drops nothing.

        Returns y, h, v. n is `lora.norm`, or computed where that is None.
        """
        f, dropped = factor(measured(self, W, lora), self.xp), self.dropout(x, drop)
        v = w = self._rows(dropped, _values(W).T)
        h, low = self._rows(dropped, lora.A.T), None
        if bool((lora.B != 0).any()):
            up = self.xp.ascontiguousarray(lora.B).T
            low = x.dtype.type(lora.scale) * self._rows(h, up)
            v = w + low
        y = f * v
        if dropped is not x:
            z = self._rows(x, _values(W).T)
            y = self.xp.where(f == 1, z, z + (f - 1) * w)  # f = 1 is plain LoRA
            y = y if low is None else y + f * low
        y = y if bias is None else y + bias
        return as_dtype(y if residual is None else residual + y, dtype), h, v

    def dora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        v: Array,
        W: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array, Array, Array]:
        """dm = sum over rows of dy v / n; dA and dB are those of LoRA for f dy;
        dx = add + dy W + drop'((f - 1) dy W + s (f dy B) A). Returns (dx, dA, dB, dm)."""
        lora = measured(self, W, lora)
        f, low, dm = factor(lora, self.xp), low_rank(lora), magnitude_grad(dy, v, lora, self.xp)
        _, dA, dB = self.lora_backward(f * dy, x, h, W, low, drop, need_dx=False)
        dx = None
        if need_dx:
            dx = self._rows(dy, _values(W))
            through, _, _ = self.lora_backward(
                f * dy, None, None, W, low, need_dA=False, need_dB=False
            )
            plain = drop is None or drop.p == 0
            dx = through if plain else dx + self.dropout(through - dx, drop)
            dx = as_dtype(dx, dtype) if add is None else add + dx
        return dx, dA, dB, dm


def _values(W: Any) -> Array:
    """The values of a weight: an array, or what NumpyBackend.pack made of one."""
    return getattr(W, "values", W)
