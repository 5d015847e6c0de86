"""Loss and gradients of one step, added up over its micro-batches: those of the whole batch.

Several processes compute different micro-batches; loss and gradients are the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.model.linear import DropKey, Grads, add_grad
from pylora.training.batching import Step, batches, label_count
from pylora.training.examples import Example
from pylora.training.optimizer import trainable
from pylora.training.ranks import ALONE, Ranks, shares, total_gradients


def step_gradients(
    model: Any,
    examples: Sequence[Example],
    step: Step,
    *,
    drop: DropKey | None = None,
    recompute: bool = False,
    smoothing: float = 0.0,
    ranks: Ranks = ALONE,
) -> tuple[float, int, Grads]:
    """(loss, rows, Grads) of a step: the mean over all labels of all its micro-batches.

    `smoothing`: see `Llama.loss`. The loss is rounded once, so it does not depend on the split;
    gradients are added in order.
    """
    count = label_count(examples, step)
    more = {"smoothing": smoothing} if smoothing else {}
    stretches = shares(len(step), ranks.size)
    parts: list[float] = []
    mine: list[Grads] = []
    total: Grads = {}
    for batch in batches(examples, step, stretches[ranks.rank]):
        weight = np.full(batch.ids.size, 1 / count, np.float32)
        key = None if drop is None else drop.from_row(batch.row0)
        nll, grads = model.loss(
            batch.ids, batch.labels, batch.seqs, weight=weight, drop=key, recompute=recompute,
            **more,
        )  # fmt: skip
        parts.extend(nll.tolist())
        if ranks.size > 1:
            mine.append(grads)
            continue
        for path, grad in grads.items():  # at once, so that only the sum is kept
            add_grad(total, path, grad)
    if ranks.size > 1:
        counts = [len(stretch) for stretch in stretches]
        like = {**trainable(model.placed), **model.whole_arrays}
        total = total_gradients(ranks, mine, counts, like, model.ops)
    every = [part for one in ranks.gather(parts) for part in one]
    return math.fsum(every) / count, len(every), total
