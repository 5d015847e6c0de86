"""Evaluations of a run: before it, while it lasts and at its end; the best one, and when to stop.

The adapter of the best evaluation is kept in out_dir/best-NNNNNN, so that a run which is
interrupted, or which crashes and goes back to a checkpoint, ends with the same one. What stands in
`Progress` about it is saved with each checkpoint.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pylora.errors import ConfigError
from pylora.training.checkpoint import Progress, checkpoints
from pylora.training.config import TrainConfig
from pylora.training.evaluate import Evaluation, Measured
from pylora.training.log import Log
from pylora.training.objectives.base import Objective
from pylora.training.ranks import ALONE, Ranks

LOSS = "loss"
Measure = Callable[[], Measured]
_BEST = re.compile(r"best-(\d{6,})")


def value_of(evaluation: Evaluation, name: str) -> float:
    """The figure called `name`: "loss", or a metric of the evaluation. ConfigError if it has none
    of that name."""
    if name == LOSS:
        return evaluation.nll
    if name not in evaluation.metrics:
        known = ", ".join((LOSS, *evaluation.metrics))
        raise ConfigError(f"best_by is {name!r}, which the evaluation does not have: {known}")
    return evaluation.metrics[name]


def better(new: float, old: float | None, name: str) -> bool:
    """Whether `new` is better: a loss that is lower, any other figure that is higher. What is not
    a number is never better."""
    if not math.isfinite(new):
        return False
    if old is None:
        return True
    return new < old if name.endswith(LOSS) else new > old


class Watch:
    """The evaluations of one run."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Any] | None,
        config: TrainConfig,
        measure: Measure | None,
        objective: Objective,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks, self.objective = ranks, objective
        self.model, self.examples, self.config, self.measure = model, examples, config, measure
        self.seen: list[tuple[int, Evaluation]] = []
        self.log: Log | None = None
        self.out_dir: Path | None = None

    def due(self, step: int, last: bool) -> bool:
        """Whether there is an evaluation after this step."""
        every = self.config.eval_every
        return bool(self.examples) and (last or bool(every and step % every == 0))

    def now(self) -> Evaluation:
        """The evaluation of the adapter as it is."""
        size = self.config.batch_size
        evaluation = self.objective.evaluate(self.model, self.examples or (), size)
        if self.measure is not None:
            found = self.ranks.first(self.measure)  # one answer, whatever machines the others are
            figures = {**evaluation.metrics, **found.metrics}
            evaluation = replace(evaluation, metrics=figures, samples=found.samples)
        return evaluation

    def look(self, step: int) -> Evaluation:
        """Evaluates, and logs it."""
        evaluation = self.now()
        if self.config.best_by is not None:
            value_of(evaluation, self.config.best_by)  # known from the first one on
        self.seen.append((step, evaluation))
        if self.log is not None:
            self.log.add(evaluation_line(step, evaluation))
        return evaluation

    def judge(self, evaluation: Evaluation, progress: Progress, adapter: Any) -> None:
        """Notes whether this is the best so far, and keeps its adapter if so."""
        name = self.config.best_by
        if name is None:
            return
        value = value_of(evaluation, name)
        if not better(value, progress.best, name):
            progress.stale += 1
            return
        progress.best, progress.best_step, progress.stale = value, progress.step, 0
        if self.out_dir is not None:
            adapter.save(self.out_dir / f"best-{progress.step:06d}")

    def exhausted(self, progress: Progress) -> bool:
        """Whether `patience` evaluations in a row were no better."""
        return self.config.patience is not None and progress.stale >= self.config.patience

    # ---- the folders of the best --------------------------------------------------------------

    def tidy(self) -> None:
        """Removes the best adapters that no checkpoint can go back to."""
        if self.out_dir is None or not (kept := checkpoints(self.out_dir)):
            return
        oldest = int(kept[0].name.rpartition("-")[2])
        older = [step for step in bests(self.out_dir) if step <= oldest]
        for step in older[:-1]:
            shutil.rmtree(self.out_dir / f"best-{step:06d}")

    def best_folder(self, progress: Progress) -> Path | None:
        """Where the best adapter is, unless it is the run's last one anyway."""
        if self.out_dir is None or progress.best is None or progress.best_step == progress.step:
            return None
        folder = self.out_dir / f"best-{progress.best_step:06d}"
        return folder if folder.is_dir() else None


def bests(out_dir: Path) -> list[int]:
    """The steps whose adapters are kept as the best of their time, in order."""
    if not out_dir.is_dir():
        return []
    return sorted(int(m[1]) for p in out_dir.iterdir() if (m := _BEST.fullmatch(p.name)))


def remove_bests(out_dir: Path) -> None:
    """Removes all of them."""
    for step in bests(out_dir):
        shutil.rmtree(out_dir / f"best-{step:06d}")


def evaluation_line(step: int, e: Evaluation) -> dict[str, Any]:
    """A line of the log."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    line: dict[str, Any] = {
        "step": step, "eval_loss": number(e.nll), "eval_perplexity": number(e.perplexity)
    }  # fmt: skip
    line |= {f"eval_{name}": number(value) for name, value in e.metrics.items()}
    if e.samples:
        line["samples"] = [dict(sample) for sample in e.samples]
    return line


def interval(steps: int, examples: int, batch_size: int) -> int:
    """Steps between evaluations where nobody said: about ten in a run, fewer where looking would
    take more than a third of the time that training does."""
    return max(1, math.ceil(steps / 10), math.ceil(examples / batch_size))
