"""The final norm and lm_head: logits of rows of the residual stream, or their loss at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.model.linear import DropKey, Grads, LinearCache, LoRALinear
from pylora.model.normed import through_norm, trains
from pylora.ops.protocol import Backend
from pylora.reference import IGNORE
from pylora.types import Array, Norm, brief


@dataclass(eq=False)
class HeadCache:
    """What backward needs of one forward."""

    __repr__ = brief

    x: Array  # [n, hidden], input of the final norm
    rstd: Array
    linear: LinearCache
    capped: Array | None = None  # the logits, where a cap's backward needs them


class Head:
    """A model's final norm and lm_head. They belong to the model."""

    def __init__(
        self,
        norm: Norm,
        lm_head: LoRALinear,
        dtype: Any,
        ops: Backend,
        multiplier: float = 1.0,
        cap: float = 0.0,
    ) -> None:
        """`dtype`: of the normed rows, None: the computation's own. `multiplier` and `cap`: see
        `soft_cap_forward`."""
        self.norm, self.lm_head, self.dtype, self.ops = norm, lm_head, dtype, ops
        self.multiplier, self.cap = multiplier, cap

    @property
    def has_dropout(self) -> bool:
        return self.lm_head.lora is not None and self.lm_head.lora.dropout > 0

    def forward(
        self, x: Array, drop: DropKey | None, first_row: int = 0
    ) -> tuple[Array, HeadCache]:
        """Rows x [n, hidden] of the residual stream -> logits [n, vocab]. Dropout is keyed by row
        number: that of x[0] is `first_row`."""
        normed, rstd = self.ops.norm_forward(x, self.norm, self.dtype)
        logits, linear = self.lm_head.forward(normed, drop=drop, first_row=first_row)
        if self.multiplier != 1 or self.cap:
            logits = self.ops.soft_cap_forward(logits, self.multiplier, self.cap)
        return logits, HeadCache(x, rstd, linear, logits if self.cap else None)

    def backward(
        self, dlogits: Array, cache: HeadCache, grads: Grads, need_dx: bool
    ) -> Array | None:
        """dx [n, hidden], where it is needed; the gradients of lm_head's adapter, and of what is
        trained whole here, into `grads`."""
        if self.multiplier != 1 or self.cap:
            kept = dlogits if cache.capped is None else cache.capped
            dlogits = self.ops.soft_cap_backward(dlogits, kept, self.multiplier, self.cap)
        need_dn = need_dx or trains(self.norm)
        dn = self.lm_head.backward(dlogits, cache.linear, grads, need_dx=need_dn)
        if dn is None:
            return None
        dx = through_norm(self.ops, dn, cache.x, self.norm, cache.rstd, grads)
        return dx if need_dx else None

    def loss(
        self,
        x: Array,
        labels: Array,
        weight: Array | None,
        drop: DropKey | None,
        first_row: int,
        need_dx: bool,
        grads: Grads,
        smoothing: float = 0.0,
    ) -> tuple[Array, Array | None]:
        """nll and dx of some rows x [n, hidden] of the residual stream; no dx without a weight.

        With `smoothing` e of V tokens the label's share is 1 - e + e / V and each other's e / V:
        the nll grows by e (z_label - mean z), as transformers' label_smoothing_factor has it.
        """
        logits, cache = self.forward(x, drop, first_row)
        added = self._smoothed(logits, labels, smoothing) if smoothing else None
        if weight is None or not (need_dx or self.lm_head.trained or trains(self.norm)):
            nll = self.ops.cross_entropy_forward(logits, labels)[0]
            return nll if added is None else nll + added, None
        overwrite = cache.capped is None  # else backward reads them
        nll, _, dlogits = self.ops.cross_entropy(logits, labels, weight, overwrite=overwrite)
        if added is not None:
            nll = nll + added
            self._spread(dlogits, labels, weight, smoothing)
        del logits
        return nll, self.backward(dlogits, cache, grads, need_dx)

    def _smoothed(self, logits: Array, labels: Array, smoothing: float) -> Array:
        """What smoothing adds to the nll of each row [n]; nothing where there is no label."""
        xp = self.ops.xp
        labels = xp.asarray(labels)
        rows, counted = xp.arange(labels.size), labels != IGNORE
        own = logits[rows, xp.where(counted, labels, 0)]
        mean = logits.mean(axis=1, dtype=np.float64)
        added = smoothing * (own - mean) * counted
        return added.astype(logits.dtype)

    def _spread(self, dlogits: Array, labels: Array, weight: Array, smoothing: float) -> None:
        """Makes the gradient of the labels that of smoothed ones, in place."""
        xp = self.ops.xp
        labels, weight = xp.asarray(labels), xp.asarray(weight)
        counted = labels != IGNORE
        part = weight * dlogits.dtype.type(smoothing) * counted
        dlogits -= (part / dlogits.dtype.type(dlogits.shape[1]))[:, None]
        dlogits[xp.arange(labels.size), xp.where(counted, labels, 0)] += part
