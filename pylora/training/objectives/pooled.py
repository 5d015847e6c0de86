"""The top of a classifier: the final norm at each text's last token, and a matrix on it.

The matrix is small, so scores, losses and its gradient are computed in float64, each text by
itself: no number depends on which texts are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.model.linear import DropKey, Grads
from pylora.types import Array, brief


@dataclass(eq=False)
class HeadGrad:
    """The gradient of the head's matrix [classes, hidden], float32."""

    __repr__ = brief

    weight: Array

    def add(self, other: HeadGrad) -> None:
        """Adds another one in place."""
        self.weight += other.weight


class PooledTop:
    """Scores [n, classes] of n texts; `slopes` is given them and returns dL/dscores."""

    def __init__(
        self,
        last: Sequence[int],
        score: Array,
        slopes: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """last: the row of each text's last token; score [classes, hidden]."""
        self.last, self.weight = np.asarray(last, np.int64), np.asarray(score, np.float64)
        self.slopes = slopes
        self.scores = np.empty((0, self.weight.shape[0]))

    def forward(self, model: Any, x: Array, drop: DropKey | None) -> None:
        """Sets `scores`."""
        ops = model.ops
        rows = ops.take_rows(x, ops.xp.asarray(self.last))
        normed, rstd = ops.norm_forward(rows, model.head.norm, None)
        self._kept = rows, rstd, ops.to_numpy(normed).astype(np.float64)
        self.scores = np.stack([(self.weight * y).sum(axis=1) for y in self._kept[2]])

    def backward(
        self, model: Any, x: Array, drop: DropKey | None, need_dx: bool, grads: Grads
    ) -> Array | None:
        """dx [m, hidden]; the head's gradient goes into `grads` under "score"."""
        assert self.slopes is not None, "a top without slopes has no gradient"
        ops, (rows, rstd, normed) = model.ops, self._kept
        slopes = self.slopes(self.scores)
        weight = np.zeros(self.weight.shape)
        for slope, y in zip(slopes, normed):
            weight += slope[:, None] * y
        grads["score"] = HeadGrad(weight.astype(np.float32))  # type: ignore[assignment]
        if not need_dx:
            return None
        dn = np.stack([(slope[:, None] * self.weight).sum(axis=0) for slope in slopes])
        dn = ops.asarray(dn.astype(np.empty(0, model.dtype).real.dtype))
        dx = ops.zeros(x.shape, model.dtype)
        ops.put_rows(
            dx, ops.xp.asarray(self.last), ops.norm_backward(dn, rows, model.head.norm, rstd)
        )
        return dx
