"""Distillation: a student learns what a teacher says of each token (Hinton et al. 2015), from the
teacher's k likeliest tokens and the rest of its probability as one more (soft.py).

    L = (1 - mix) T² KL(teacher ‖ student) + mix NLL(label),  the mean over the labels of a step

The teacher is asked once, before the run, and let go. It must have the student's vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError, DataError, UnsupportedError
from pylora.model.linear import DropKey, Grads
from pylora.model.through import through
from pylora.reference import IGNORE
from pylora.training.batching import Step
from pylora.training.evaluate import Evaluation
from pylora.training.examples import Example, Examples, check_examples
from pylora.training.objectives.base import Plain
from pylora.training.objectives.items import Items
from pylora.training.objectives.rows import Sum, batched, laid_out
from pylora.training.objectives.settings import Settings
from pylora.training.objectives.soft import Said, SoftTop, TeacherTop
from pylora.types import brief


@dataclass(frozen=True, eq=False)
class Taught:
    """An example, and what the teacher said of each of its rows that count."""

    __repr__ = brief

    example: Example
    said: Said

    def __len__(self) -> int:
        return len(self.example)

    @property
    def ids(self) -> np.ndarray:
        return self.example.ids

    @property
    def where(self) -> str:
        return self.example.where


def teach(teacher: Any, examples: Sequence[Example], *, top_k: int, temperature: float) -> Items:
    """What `teacher` (with the adapter it has) says of the examples.

    No number depends on what is computed together. ConfigError for a top_k that the vocabulary
    does not have."""
    vocab = teacher.config.vocab_size
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= vocab:
        raise ConfigError(f"top_k is {top_k!r}; it must be a whole number from 1 to {vocab}")
    check_examples(examples, teacher.config, "teacher's")
    said: dict[int, Said] = {}
    for micro in batched(examples, 8):
        some = [examples[i] for i in micro]
        ids, labels, seqs, parts = laid_out(some, [e.labels for e in some])
        rows = np.flatnonzero(labels != IGNORE)
        top = TeacherTop(rows, top_k, temperature)
        through(teacher, ids, seqs, top, grads=False)
        for i, part in zip(micro, parts):
            mine = (rows >= part.start) & (rows < part.stop)
            said[i] = Said(top.said.ids[mine], top.said.logp[mine])
    notes = examples.notes if isinstance(examples, Examples) else ()
    cut = examples.truncated if isinstance(examples, Examples) else 0
    return Items([Taught(e, said[i]) for i, e in enumerate(examples)], cut, notes)


def check_same_tokens(ours: Sequence[Example], theirs: Sequence[Example]) -> None:
    """DataError, with its place, where a teacher's tokenizer makes other tokens of the records."""
    for mine, other in zip(ours, theirs, strict=True):
        if not np.array_equal(mine.ids, other.ids):
            raise DataError(
                f"{mine.where}: the teacher's tokenizer makes other tokens of this record than the "
                "student's; distillation needs one vocabulary"
            )


class Distill(Plain):
    """The loss at the top of this file, of `Taught` items."""

    name = "distill"
    uses = ("temperature", "mix")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def identity(self) -> dict[str, Any]:
        return {"objective": self.name, **{n: getattr(self.settings, n) for n in self.uses}}

    def digest(self, items: Sequence[Any]) -> str:
        h = hashlib.sha256()
        for item in items:
            h.update(np.ascontiguousarray(item.example.ids, "<i8").tobytes())
            h.update(np.ascontiguousarray(item.example.labels, "<i8").tobytes())
            h.update(np.ascontiguousarray(item.said.ids, "<i8").tobytes())
            h.update(np.ascontiguousarray(item.said.logp, "<f4").tobytes())
        return h.hexdigest()

    def check(
        self, items: Sequence[Any], model: Any, what: str, max_tokens: int | None = None
    ) -> None:
        for item in items:
            if not isinstance(item, Taught):
                raise DataError("objective distill needs examples that a teacher saw (`teach`)")
            if item.said.ids.size and item.said.ids.max() >= model.config.vocab_size:
                raise DataError(f"{item.where}: the teacher's vocabulary is not the model's")
        check_examples([item.example for item in items], model.config, what, max_tokens)

    def gradients(
        self, model: Any, items: Sequence[Any], step: Step, drop: DropKey | None, recompute: bool
    ) -> tuple[float, int, Grads]:
        if drop is not None and model.head.has_dropout:
            raise UnsupportedError("distillation with dropout on the output layer")
        count = sum(len(items[i].said.ids) for micro in step for i in micro)
        total = Sum(model, drop, recompute)
        losses: list[float] = []
        for micro in step:
            ids, seqs, top = self._top([items[i] for i in micro], 1 / count)
            total.add(ids, seqs, top)
            losses += top.loss.tolist()
        return math.fsum(losses) / count, total.rows, total.grads

    def _top(self, items: Sequence[Taught], weight: float | None) -> tuple[Any, Any, SoftTop]:
        ids, labels, seqs, _ = laid_out(items, [item.example.labels for item in items])
        rows = np.flatnonzero(labels != IGNORE)
        said = Said(
            np.concatenate([item.said.ids for item in items]),
            np.concatenate([item.said.logp for item in items]),
        )
        s = self.settings
        top = SoftTop(rows, labels[rows], said, temperature=s.temperature, mix=s.mix, weight=weight)
        return ids, seqs, top

    def evaluate(self, model: Any, items: Sequence[Any], batch_size: int) -> Evaluation:
        """metrics: "kl", and "agreement": how often the likeliest token is the teacher's."""
        began, parts = time.perf_counter(), []
        for micro in batched(items, batch_size):
            ids, seqs, top = self._top([items[i] for i in micro], None)
            through(model, ids, seqs, top, grads=False)
            parts.append(top)
        loss, kl = (
            math.fsum(x for top in parts for x in getattr(top, name).tolist())
            for name in ("loss", "kl")
        )
        count = sum(top.rows.size for top in parts)
        agrees = sum(int(top.agrees.sum()) for top in parts)
        metrics = {"kl": kl / count, "agreement": agrees / count}
        seconds = time.perf_counter() - began
        return Evaluation(loss / count, math.nan, count, seconds, metrics)
