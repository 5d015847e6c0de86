"""A model under another top than its loss: preferences, classes, distillation.

`Llama.loss` is a language model's loss, whose gradient at each row is known as soon as that row is.
Here the top gets the whole residual stream, may look at all of it, and says what its gradient is:
`TokenTop` needs the log-probabilities of whole answers before any row's weight is known. The trunk
runs once each way. No loss is defined here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from pylora.errors import ShapeError
from pylora.model.attention import positions
from pylora.model.inputs import token_ids, whole_seqs
from pylora.model.linear import DropKey, Grads
from pylora.reference import IGNORE
from pylora.types import Array, Seqs

Seeds = Callable[[np.ndarray], np.ndarray]


class Top(Protocol):
    """What stands on the trunk in place of the language model's loss."""

    def forward(self, model: Any, x: Array, drop: DropKey | None) -> None:
        """Looks at the residual stream x [m, hidden]."""

    def backward(
        self, model: Any, x: Array, drop: DropKey | None, need_dx: bool, grads: Grads
    ) -> Array | None:
        """The gradient of x [m, hidden] where it is needed; gradients of its own into `grads`."""


def through(
    model: Any,
    ids: Any,
    seqs: Seqs | None,
    top: Top,
    *,
    drop: DropKey | None = None,
    grads: bool = True,
    recompute: bool = False,
) -> Grads | None:
    """ids int64 [m] through the model's trunk and `top`; the gradients, or None without `grads`.

    What the top found out it keeps itself. `seqs`, `drop` and `recompute`: as for `Llama.loss`.
    """
    ids = token_ids(ids, model.config.vocab_size)
    seqs = whole_seqs(seqs, ids.size)
    position = model.ops.xp.asarray(positions(seqs))
    trunk, blocks = model.trunk, len(model.blocks)
    lowest = trunk.lowest if grads else blocks
    x, cache = trunk.forward(ids, seqs, position, drop, lowest, recompute)
    top.forward(model, x, drop)
    if not grads:
        return None
    found: Grads = {}
    dx = top.backward(model, x, drop, lowest < blocks, found)
    del x
    if dx is not None:
        trunk.backward(dx, cache, found)
    return found


class TokenTop:
    """The negative log-likelihood of labels, weighted by a function of all of them.

    labels int64 [m], IGNORE (-100) where a row does not count; `seeds` is given nll [m] (0 where a
    row does not count) and returns dL/dnll [m]. The head runs twice, in chunks of
    rows: once to know the nll, once for the gradient, so that no [m, vocab] array exists.
    """

    def __init__(self, labels: Any, seeds: Seeds | None = None) -> None:
        self.labels, self.seeds = np.asarray(labels), seeds
        self.nll = np.empty(0, np.float32)  # [m], after forward

    def _rows(self, model: Any, drop: DropKey | None) -> np.ndarray:
        # Dropout is keyed by row number, so with dropout on the head its rows stay consecutive.
        if drop is not None and model.head.has_dropout:
            return np.arange(self.labels.size)
        return np.flatnonzero(self.labels != IGNORE)

    def forward(self, model: Any, x: Array, drop: DropKey | None) -> None:
        """Sets `nll`. ShapeError unless there is a label for each row."""
        labels = token_ids(self.labels, model.config.vocab_size, labels=True)
        if labels.size != x.shape[0]:
            raise ShapeError(f"{labels.size} labels for {x.shape[0]} ids; give one to each id")
        ops, step, rows = model.ops, model.ops.head_rows, self._rows(model, drop)
        self.nll = np.zeros(labels.size, np.empty(0, model.dtype).real.dtype)
        for a in range(0, rows.size, step):
            some = rows[a : a + step]
            nll, _ = model.head.loss(
                ops.take_rows(x, ops.xp.asarray(some)),
                ops.xp.asarray(labels[some]),
                None, drop, a, False, {},
            )  # fmt: skip
            self.nll[some] = ops.to_numpy(nll)

    def backward(
        self, model: Any, x: Array, drop: DropKey | None, need_dx: bool, grads: Grads
    ) -> Array | None:
        """dx, from the weights that `seeds` gives."""
        assert self.seeds is not None, "a top without seeds has no gradient"
        ops, step, rows = model.ops, model.ops.head_rows, self._rows(model, drop)
        weight = np.ascontiguousarray(self.seeds(self.nll), np.empty(0, model.dtype).real.dtype)
        dx = ops.zeros(x.shape, model.dtype) if need_dx else None
        for a in range(0, rows.size, step):
            some = rows[a : a + step]
            at = ops.xp.asarray(some)
            _, dx_some = model.head.loss(
                ops.take_rows(x, at),
                ops.xp.asarray(self.labels[some]),
                ops.xp.asarray(weight[some]),
                drop, a, need_dx, grads,
            )  # fmt: skip
            if dx is not None:
                ops.put_rows(dx, at, dx_some)
        return dx
