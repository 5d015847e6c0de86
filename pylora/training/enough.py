"""How long to train, and how fast, where nobody said: settings that a small data set is learnt by.

An adapter needs some number of updates before it does anything, however few records there are: 60
records in steps of 8 are 8 updates an epoch, and 8 updates teach nothing. So the epochs are chosen
for the updates that they make. The rate falls with the width of the model. Both were measured on
five small jobs (docs/recipes.md, "The defaults"); nothing is looked at but sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from pylora.training.batching import epoch_of
from pylora.training.config import TrainConfig

STEPS = 120  # updates that the default makes at least ...
MOST_EPOCHS = 30  # ... unless each record would be seen more often than this
FEW = 30  # fewer updates than these have hardly ever taught anything
_RATE, _WIDTH, _POWER = 1e-3, 768, 0.8
_MOST_RATE = 2e-3


def rate_for(hidden_size: int) -> float:
    """The peak rate for a model of this width: 1e-3 at 768, less for wider ones (2.6e-4 at 4096),
    rounded to two digits; never above 2e-3."""
    rate = min(_MOST_RATE, _RATE * (_WIDTH / hidden_size) ** _POWER)
    return float(f"{rate:.1e}")


def steps_of_an_epoch(lengths: Sequence[int], config: TrainConfig, epoch: int = 0) -> int:
    """Updates in one pass over examples of these lengths."""
    if not config.packing:
        return math.ceil(len(lengths) / config.batch_size)
    return len(epoch_of(config, lengths, epoch))


def settled(config: TrainConfig, lengths: Sequence[int], hidden_size: int) -> TrainConfig:
    """`config` with a rate and, unless it has steps, epochs: chosen where it leaves them open."""
    if config.learning_rate is None:
        config = replace(config, learning_rate=rate_for(hidden_size))
    if config.epochs is None and config.steps is None:
        wanted = math.ceil(STEPS / max(1, steps_of_an_epoch(lengths, config)))
        config = replace(config, epochs=max(1, min(wanted, MOST_EPOCHS)))
    return config


def total_steps(config: TrainConfig, lengths: Sequence[int]) -> int:
    """Updates of the whole run of a settled config. With packing epochs differ in length."""
    if config.steps is not None:
        return config.steps
    epochs = config.epochs or 1
    if not config.packing:
        return epochs * steps_of_an_epoch(lengths, config)
    return sum(steps_of_an_epoch(lengths, config, epoch) for epoch in range(epochs))


def undertrained(steps: int) -> str | None:
    """A sentence about a run that is too short to teach; None if it is long enough."""
    if steps >= FEW:
        return None
    were = "1 step" if steps == 1 else f"{steps} steps"
    return (
        f"{were}: likely undertrained; an adapter begins to show after {FEW} to {STEPS} updates. "
        f"Leave epochs and steps out to have them chosen, or ask for {STEPS} steps"
    )
