"""The final norm and lm_head: logits of rows of the residual stream, or their loss at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pylora.model.linear import DropKey, Grads, LinearCache, LoRALinear
from pylora.ops.protocol import Backend
from pylora.types import Array, brief


@dataclass(eq=False)
class HeadCache:
    """What backward needs of one forward."""

    __repr__ = brief

    x: Array  # [n, hidden], input of the final norm
    rstd: Array
    linear: LinearCache


class Head:
    """A model's final norm and lm_head. They belong to the model."""

    def __init__(
        self, norm: Array, eps: float, lm_head: LoRALinear, dtype: Any, ops: Backend
    ) -> None:
        """`dtype`: of the normed rows, None: the computation's own."""
        self.norm, self.eps, self.lm_head, self.dtype, self.ops = norm, eps, lm_head, dtype, ops

    @property
    def has_dropout(self) -> bool:
        return self.lm_head.lora is not None and self.lm_head.lora.dropout > 0

    def forward(
        self, x: Array, drop: DropKey | None, first_row: int = 0
    ) -> tuple[Array, HeadCache]:
        """Rows x [n, hidden] of the residual stream -> logits [n, vocab]. Dropout is keyed by row
        number: that of x[0] is `first_row`."""
        normed, rstd = self.ops.rms_norm_forward(x, self.norm, self.eps, self.dtype)
        logits, linear = self.lm_head.forward(normed, drop=drop, first_row=first_row)
        return logits, HeadCache(x, rstd, linear)

    def backward(
        self, dlogits: Array, cache: HeadCache, grads: Grads, need_dx: bool
    ) -> Array | None:
        """dx [n, hidden], where it is needed; the gradient of lm_head's adapter into `grads`."""
        dn = self.lm_head.backward(dlogits, cache.linear, grads, need_dx=need_dx)
        if not need_dx:
            return None
        return self.ops.rms_norm_backward(dn, cache.x, self.norm, cache.rstd)[0]

    def loss(
        self,
        x: Array,
        labels: Array,
        weight: Array | None,
        drop: DropKey | None,
        first_row: int,
        need_dx: bool,
        grads: Grads,
    ) -> tuple[Array, Array | None]:
        """nll and dx of some rows x [n, hidden] of the residual stream; no dx without a weight."""
        logits, cache = self.forward(x, drop, first_row)
        if weight is None or not (need_dx or self.lm_head.lora is not None):
            return self.ops.cross_entropy_forward(logits, labels)[0], None
        nll, _, dlogits = self.ops.cross_entropy(logits, labels, weight, overwrite=True)
        del logits
        return nll, self.backward(dlogits, cache, grads, need_dx)
