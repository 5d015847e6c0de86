"""Classes and numbers of whole texts, by a head that is trained with the adapter (headed.py).

    classify:  L = -log softmax(scores)[label]          regress:  L = (score - label)²

Each is the mean over the texts of a step, as in transformers' ...ForSequenceClassification.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import Load
from pylora.adapters.plan import Plan
from pylora.errors import ConfigError, DataError, UnsupportedError
from pylora.model.linear import DropKey, Grads
from pylora.model.through import through
from pylora.training.batching import Step
from pylora.training.evaluate import Evaluation
from pylora.training.examples import Example, check_examples
from pylora.training.objectives import labelled
from pylora.training.objectives.headed import SCORE, HeadedAdapter
from pylora.training.objectives.labelled import Labelled
from pylora.training.objectives.pooled import PooledTop
from pylora.training.objectives.rows import Sum, batched, laid_out
from pylora.types import Array


class Classify:
    """The cross entropy of a text's class."""

    name = "classify"

    def identity(self) -> dict[str, Any]:
        return {"objective": self.name}

    def digest(self, items: Sequence[Any]) -> str:
        return labelled.digest(items)

    def prepare(self, model: Any, items: Sequence[Any], out_dir: Path | None) -> None:
        """ConfigError where the adapter has no head, DataError for a label that is none of the
        head's. Nothing is computed beforehand."""
        rows = head_of(model).score.shape[0]
        for item in items:
            self.check_label(item, rows)

    def check_label(self, item: Labelled, rows: int) -> None:
        """DataError, naming its place, for a label that is none of the head's."""
        if not 0 <= item.label < rows:
            raise DataError(
                f"{item.where}: the label {item.label:g} is out of range: the head has {rows} "
                f"classes, 0 to {rows - 1}"
            )

    def fresh(
        self, plan: Plan, config: LoraConfig, seed: int, model: Any, items: Any, base: Load | None
    ) -> Adapter:
        hidden, classes = model.config.hidden_size, getattr(items, "classes", ())
        return HeadedAdapter.fresh(plan, config, seed, hidden, classes, base)

    def parameters(self, model: Any) -> Mapping[str, Array]:
        return {SCORE: head_of(model).score}

    def check(
        self, items: Sequence[Any], model: Any, what: str, max_tokens: int | None = None
    ) -> None:
        if not items:
            raise DataError(f"there are no {what} records")
        for item in items:
            if not isinstance(item, Labelled):
                raise DataError(
                    f"objective {self.name} needs texts with labels (docs/objectives.md)"
                )
            example = Example(item.ids, item.ids, item.where)
            check_examples([example], model.config, what, max_tokens)

    def gradients(
        self, model: Any, items: Sequence[Any], step: Step, drop: DropKey | None, recompute: bool
    ) -> tuple[float, int, Grads]:
        n = sum(map(len, step))
        losses: list[float] = []
        total, score = Sum(model, drop, recompute), head_of(model).score
        for micro in step:
            some = [items[i] for i in micro]
            ids, _, seqs, parts = laid_out(some, [item.ids for item in some])

            def slopes(scores: np.ndarray, some: Any = some) -> np.ndarray:
                found = [self.of(item, row) for item, row in zip(some, scores)]
                losses.extend(loss for loss, _ in found)
                return np.stack([slope / n for _, slope in found])

            total.add(ids, seqs, PooledTop([p.stop - 1 for p in parts], score, slopes))
        return math.fsum(losses) / n, total.rows, total.grads

    def of(self, item: Labelled, scores: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss of one text and its gradient with respect to its scores [classes]."""
        self.check_label(item, scores.size)
        label = int(item.label)
        shifted = scores - scores.max()
        log_sum = math.log(math.fsum(np.exp(shifted).tolist()))
        slope = np.exp(shifted - log_sum)
        slope[label] -= 1
        return log_sum - float(shifted[label]), slope

    def evaluate(self, model: Any, items: Sequence[Any], batch_size: int) -> Evaluation:
        began, score = time.perf_counter(), head_of(model).score
        rows: list[Any] = [None] * len(items)
        for micro in batched(items, batch_size):
            some = [items[i] for i in micro]
            ids, _, seqs, parts = laid_out(some, [item.ids for item in some])
            top = PooledTop([p.stop - 1 for p in parts], score)
            through(model, ids, seqs, top, grads=False)
            for i, row in zip(micro, top.scores):
                rows[i] = row
        losses = [self.of(item, row)[0] for item, row in zip(items, rows)]
        tokens = sum(map(len, items))
        metrics = self.metrics([item.label for item in items], np.stack(rows))
        loss = math.fsum(losses) / len(losses)
        return Evaluation(loss, math.nan, tokens, time.perf_counter() - began, metrics)

    def metrics(self, labels: Sequence[float], scores: np.ndarray) -> dict[str, float]:
        """accuracy, and macro_f1: the mean of the classes' F1, of those that occur."""
        want, got = np.asarray(labels, np.int64), scores.argmax(axis=1)
        f1 = []
        for c in sorted({*want.tolist(), *got.tolist()}):
            both = int(((want == c) & (got == c)).sum())
            f1.append(2 * both / (int((want == c).sum()) + int((got == c).sum())))
        return {"accuracy": float((want == got).mean()), "macro_f1": math.fsum(f1) / len(f1)}


class Regress(Classify):
    """The squared error of a text's number."""

    name = "regress"

    def check_label(self, item: Labelled, rows: int) -> None:
        """DataError for a number that is not finite."""
        if not math.isfinite(item.label):
            raise DataError(f"{item.where}: the label {item.label!r} is not finite")

    def of(self, item: Labelled, scores: np.ndarray) -> tuple[float, np.ndarray]:
        off = float(scores[0]) - item.label
        slope = np.zeros(scores.size)
        slope[0] = 2 * off
        return off * off, slope

    def metrics(self, labels: Sequence[float], scores: np.ndarray) -> dict[str, float]:
        """rmse, and r2: the share of the labels' variance that is explained."""
        want, off = np.asarray(labels), np.asarray(labels) - scores[:, 0]
        spread = float(((want - want.mean()) ** 2).sum())
        out = {"rmse": math.sqrt(float((off**2).mean()))}
        return out if spread == 0 else {**out, "r2": 1 - float((off**2).sum()) / spread}


def head_of(model: Any) -> HeadedAdapter:
    """The attached adapter, with its head."""
    adapter = model.adapter
    if not isinstance(adapter, HeadedAdapter):
        raise ConfigError(
            "this objective trains an adapter with a head: make it with HeadedAdapter.fresh "
            "(pylora.training.objectives.headed)"
        )
    if model.ops.name not in ("c", "numpy"):
        raise UnsupportedError(
            f"heads for classes and numbers are trained on the CPU: backend c, not {model.ops.name}"
        )
    return adapter
