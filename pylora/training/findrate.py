"""A rate finder: a short run in which the rate grows from one step to the next (Smith 2017).

The rate rises by a constant factor from `low` to `high`, a step each. The loss hardly moves at
first, falls where the rate teaches, and rises where it is too large. Batches differ in how hard
they are, so a few come in turn, and each step's loss is taken relative to that of the adapter as it
was on the same batch, and smoothed. The run ends early once that is far above the least. Half of
the rate at which it was least is suggested: a run keeps its rate for longer than one step. (The
rate of the steepest fall, which is suggested elsewhere, is several times too low for adapters: B
begins at zero, so that the loss falls late.) Nothing is kept of the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError
from pylora.model.linear import DropKey
from pylora.training.batching import Step, epoch_of
from pylora.training.config import TrainConfig
from pylora.training.objectives.base import NextToken, Objective
from pylora.training.optimizer import gradients, trainable
from pylora.training.optimizer8 import optimizer_of
from pylora.types import LoRA, brief

LOW, HIGH, STEPS = 1e-5, 0.1, 60
_SMOOTH = 0.8  # how much of the mean stays at each step
_LOST = 0.3  # above the least, as a part of the first loss: it will not come back
_FEWEST = 12
_BATCHES = 8  # that come in turn


@dataclass(frozen=True)
class Found:
    """rates and losses of each step; `relative`: to the untrained adapter's, smoothed."""

    __repr__ = brief

    rates: Sequence[float]
    losses: Sequence[float]
    relative: Sequence[float]
    suggested: float | None  # None: the loss fell nowhere
    least: float  # the rate at which the loss was least


def find_rate(
    model: Any,
    adapter: Mapping[str, LoRA],
    examples: Sequence[Any],
    config: TrainConfig | None = None,
    objective: Objective | None = None,
    *,
    low: float = LOW,
    high: float = HIGH,
    steps: int = STEPS,
    on_step: Callable[[int, float, float], None] | None = None,
) -> Found:
    """Tries rates on batches of `examples` with the settings of `config`; of those its rate,
    schedule and length say nothing here. `adapter` has the numbers that it had, afterwards.

    on_step gets (step, rate, loss). ConfigError unless 0 < low < high and there are 12 steps.
    """
    config = config or TrainConfig()
    if not 0 < low < high < math.inf:
        raise ConfigError(f"rates from {low:g} to {high:g}: the first must be above 0 and less")
    if steps < _FEWEST:
        raise ConfigError(f"a rate finder of {steps} steps shows nothing; {_FEWEST} at least")
    objective = objective or NextToken(smoothing=config.label_smoothing_factor)
    objective.check(examples, model, "training", config.max_tokens)
    if getattr(adapter, "whole", None) is not None:
        raise ConfigError(
            "a rate is looked for with A and B alone: leave modules_to_save out, and the rate that "
            "is found will do for them, too"
        )
    before = {name: np.array(a) for name, a in trainable(adapter).items()}
    model.attach(adapter)
    objective.prepare(model, examples, None)
    try:
        return _tried(model, examples, config, objective, low, high, steps, on_step)
    finally:
        for name, array in trainable(adapter).items():
            array[...] = before[name]
        model.attach(adapter)


def _tried(
    model: Any,
    examples: Sequence[Any],
    config: TrainConfig,
    objective: Objective,
    low: float,
    high: float,
    steps: int,
    on_step: Callable[[int, float, float], None] | None,
) -> Found:
    batches = epoch_of(config, [len(e) for e in examples])[:_BATCHES]
    arrays = {**trainable(model.placed), **objective.parameters(model)}
    optimizer = optimizer_of(model.ops, arrays, config)

    def gradients_of(number: int, step: Step) -> tuple[float, Any]:
        drop = DropKey(config.seed, number, noise=config.neftune_noise_alpha)
        loss, _, grads = objective.gradients(model, examples, step, drop, config.recompute)
        return loss, grads

    first = [gradients_of(0, step)[0] for step in batches]
    rates: list[float] = []
    losses: list[float] = []
    relative: list[float] = []
    mean = weight = 0.0
    for i in range(steps):
        at = i % len(batches)
        rate = low * (high / low) ** (i / (steps - 1))
        loss, grads = gradients_of(i + 1, batches[at])
        named = gradients(grads, arrays)
        norm = optimizer.norm(named)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            break
        mean = _SMOOTH * mean + (1 - _SMOOTH) * (loss / max(first[at], 1e-9))
        weight = _SMOOTH * weight + (1 - _SMOOTH)
        rates.append(rate)
        losses.append(loss)
        relative.append(mean / weight)
        if on_step is not None:
            on_step(i + 1, rate, loss)
        if relative[-1] > min(relative) + _LOST:
            break
        optimizer.update(named, norm, i + 1, rate)
    return Found(rates, losses, relative, *suggested(rates, relative))


def suggested(rates: Sequence[float], relative: Sequence[float]) -> tuple[float | None, float]:
    """(the rate to train with, the rate at which the loss was least). The first is None where the
    loss never fell by 2 % of what it was."""
    if not rates:
        return None, math.nan
    best = int(np.argmin(relative))
    least = rates[best]
    if best < 2 or relative[best] > 0.98 * relative[0]:
        return None, least
    return float(f"{least / 2:.1e}"), least
