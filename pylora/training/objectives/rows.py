"""Sequences laid one behind the other, and gradients of micro-batches added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pylora.model.linear import DropKey, Grads, add_grad
from pylora.model.through import Top, through
from pylora.types import Seqs


def laid_out(
    sequences: Sequence[Any], labels: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, Seqs, list[slice]]:
    """ids and labels [m] of sequences with `.ids`, their Seqs, and the rows of each."""
    lengths = [len(s) for s in sequences]
    ends = np.cumsum(lengths).tolist()
    parts = [slice(b - n, b) for n, b in zip(lengths, ends)]
    ids = np.concatenate([s.ids for s in sequences])
    return ids, np.concatenate(list(labels)), Seqs.of(lengths), parts


def batched(items: Sequence[Any], batch_size: int) -> Iterator[tuple[int, ...]]:
    """Numbers of the items, batch_size at a time, similar lengths together."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    for start in range(0, len(order), batch_size):
        yield tuple(order[start : start + batch_size])


class Sum:
    """Gradients of a step, added in the order of its micro-batches; and its rows."""

    def __init__(self, model: Any, drop: DropKey | None, recompute: bool) -> None:
        self.model, self.drop, self.recompute = model, drop, recompute
        self.rows = 0
        self.grads: Grads = {}

    def add(self, ids: np.ndarray, seqs: Seqs, top: Top) -> None:
        """One micro-batch; dropout draws what the whole step would."""
        drop = self.drop
        key = None if drop is None else drop.from_row(self.rows)
        found = through(self.model, ids, seqs, top, drop=key, recompute=self.recompute)
        for path, grad in (found or {}).items():
            add_grad(self.grads, path, grad)
        self.rows += ids.size
