"""Objectives that are functions of the log-probabilities of whole answers: their common part.

One is written as `of`: from an item and the nll of its rows, the item's loss, and the gradient of
that loss with respect to each nll. All else is here: a step is the mean over its items, whatever
its micro-batches are; the gradient of A and B is the model's.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import DataError
from pylora.model.linear import DropKey, Grads
from pylora.model.through import TokenTop, through
from pylora.training.batching import Step
from pylora.training.evaluate import Evaluation
from pylora.training.objectives import answers as data
from pylora.training.objectives.answers import Answer
from pylora.training.objectives.base import Plain
from pylora.training.objectives.reference import Reference
from pylora.training.objectives.rows import Sum, batched, laid_out
from pylora.training.objectives.settings import Settings


@dataclass(frozen=True)
class Term:
    """What an item gives: its loss, dL/dnll [n] of each answer, and how much the model prefers each
    answer (the implicit reward of that objective)."""

    loss: float
    slopes: tuple[np.ndarray, ...]
    rewards: tuple[float, ...]


class Likelihood(Plain, ABC):
    """An objective of answers' log-probabilities. `item_kind`: what its items are."""

    name = ""
    uses: tuple[str, ...] = ()  # settings that mean something here
    needs_reference = False
    item_kind: type = data.Preference

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.reference = Reference()

    # ---- what an objective writes ---------------------------------------------------------------

    @abstractmethod
    def of(self, item: Any, nll: Sequence[np.ndarray], step: Any) -> Term:
        """The term of one item, from the nll [n] of each of its answers. `step`: see `of_step`."""

    def labels(self, item: Any) -> list[np.ndarray]:
        """The labels [n] of each answer: rows whose nll is asked for."""
        return [answer.labels for answer in item.answers]

    def of_step(self, model: Any, items: Sequence[Any]) -> Any:
        """Numbers that all items of a step share, and that have no gradient."""
        return len(items)

    # ---- what a run asks ------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        used = {name: getattr(self.settings, name) for name in self.uses}
        return {"objective": self.name, **used}

    def digest(self, items: Sequence[Any]) -> str:
        return data.digest(items)

    def check(
        self, items: Sequence[Any], model: Any, what: str, max_tokens: int | None = None
    ) -> None:
        for item in items:
            if not isinstance(item, self.item_kind):
                raise DataError(
                    f"objective {self.name} needs {self.item_kind.__name__} records (see "
                    f"docs/objectives.md), not {type(item).__name__}"
                )
        data.check(items, model.config, what, max_tokens)

    def prepare(self, model: Any, items: Sequence[Any], out_dir: Path | None) -> None:
        if self.needs_reference:
            self.reference.fill(model, self.referred(items), out_dir)

    def referred(self, items: Sequence[Any]) -> list[Answer]:
        """The answers whose reference is needed."""
        return [answer for item in items for answer in item.answers]

    def gradients(
        self, model: Any, items: Sequence[Any], step: Step, drop: DropKey | None, recompute: bool
    ) -> tuple[float, int, Grads]:
        chosen = [items[i] for micro in step for i in micro]
        shared, losses = self.of_step(model, chosen), []
        total = Sum(model, drop, recompute)
        for micro in step:
            some = [items[i] for i in micro]
            ids, labels, seqs, parts = self._laid_out(some)

            def seeds(nll: np.ndarray, some: Any = some, parts: Any = parts) -> np.ndarray:
                weight = np.zeros(nll.size)
                for term, where in self._terms(some, nll, parts, shared):
                    losses.append(term.loss)
                    for slope, part in zip(term.slopes, where):
                        weight[part] = slope / len(chosen)
                return weight

            total.add(ids, seqs, TokenTop(labels, seeds))
        return math.fsum(losses) / len(chosen), total.rows, total.grads

    def evaluate(self, model: Any, items: Sequence[Any], batch_size: int) -> Evaluation:
        """nll: the objective's loss; metrics: "accuracy" and "margin"."""
        began, rows = time.perf_counter(), 0
        shared = self.of_step(model, items)
        terms: dict[int, Term] = {}
        for micro in batched(items, batch_size):
            some = [items[i] for i in micro]
            ids, labels, seqs, parts = self._laid_out(some)
            top = TokenTop(labels)
            through(model, ids, seqs, top, grads=False)
            found = self._terms(some, top.nll, parts, shared)
            terms |= {i: term for i, (term, _) in zip(micro, found)}
            rows += ids.size
        ordered = [terms[i] for i in range(len(items))]
        loss = math.fsum(t.loss for t in ordered) / len(ordered)
        metrics = self.metrics(items, ordered)
        return Evaluation(loss, math.nan, rows, time.perf_counter() - began, metrics)

    def metrics(self, items: Sequence[Any], terms: Sequence[Term]) -> dict[str, float]:
        """accuracy: of the pairs whose chosen answer is preferred; margin: by how much, on
        average."""
        margins = [t.rewards[0] - t.rewards[1] for t in terms]
        return {
            "accuracy": sum(m > 0 for m in margins) / len(margins),
            "margin": math.fsum(margins) / len(margins),
        }

    # ---- rows -----------------------------------------------------------------------------------

    def _laid_out(self, items: Sequence[Any]) -> tuple[Any, ...]:
        answers = [answer for item in items for answer in item.answers]
        return laid_out(answers, [labels for item in items for labels in self.labels(item)])

    def _terms(
        self, items: Sequence[Any], nll: np.ndarray, parts: list[slice], shared: Any
    ) -> list[tuple[Term, list[slice]]]:
        out, at = [], 0
        for item in items:
            where = parts[at : at + len(item.answers)]
            at += len(where)
            out.append((self.of(item, [nll[p] for p in where], shared), where))
        return out


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + exp(-x))), exact at both ends."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), exact at both ends."""
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    e = math.exp(x)
    return e / (1 + e)


def preferred(margin: float, smoothing: float) -> tuple[float, float]:
    """The logistic loss of a margin and its derivative: -(1 - e) log σ(margin) - e log σ(-margin),
    where labels are wrong with probability e."""
    loss = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
    return loss, smoothing * sigmoid(margin) - (1 - smoothing) * sigmoid(-margin)
