"""Loss and gradients of one step, added up over its micro-batches: those of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.model.linear import DropKey, Grads, add_grad
from pylora.training.batching import Step, batches, label_count
from pylora.training.examples import Example


def step_gradients(
    model: Any,
    examples: Sequence[Example],
    step: Step,
    *,
    drop: DropKey | None = None,
    recompute: bool = False,
) -> tuple[float, int, Grads]:
    """(loss, rows, Grads) of a step: the mean over all labels of all its micro-batches.

    The loss is rounded once, so it does not depend on the split; gradients are added in order.
    """
    count = label_count(examples, step)
    parts: list[float] = []
    total: Grads = {}
    for batch in batches(examples, step):
        weight = np.full(batch.ids.size, 1 / count, np.float32)
        key = None if drop is None else DropKey(drop.seed, drop.step, drop.row0 + batch.row0)
        nll, grads = model.loss(
            batch.ids, batch.labels, batch.seqs, weight=weight, drop=key, recompute=recompute
        )
        parts.extend(nll.tolist())
        for path, grad in grads.items():
            add_grad(total, path, grad)
    return math.fsum(parts) / count, len(parts), total
