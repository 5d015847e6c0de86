"""The learning rate of each step: a linear warm-up, then cosine, linear or constant.

Steps are counted from 1. With w = max(warmup_steps, 1) and T steps in all:

    step <= w:  lr(step) = peak * (step / w)
    step >  w:  lr(step) = peak - (peak - floor) * fall(p),   p = (step - w) / (T - w + 1)

    cosine:    fall(p) = (1 - cos(pi p)) / 2       (Loshchilov & Hutter 2017, without restarts)
    linear:    fall(p) = p
    constant:  fall(p) = 0

The floor would be reached at step T + 1, so that no step of the run is spent at a rate of zero.
The rate is a function of the step alone: nothing has to be saved to continue a run.
"""

from __future__ import annotations

import math

from pylora.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """The rate of `step` (1 .. total_steps); `floor` is a rate, not a fraction of the peak.

    Raises ConfigError for a step outside the run or an unknown schedule.
    """
    if not 1 <= step <= total_steps:
        raise ConfigError(f"step {step} is outside the run, which has steps 1 to {total_steps}")
    warm = max(warmup_steps, 1)
    if step <= warm:
        return peak * (step / warm)
    p = (step - warm) / (total_steps - warm + 1)
    if schedule == "cosine":
        fall = (1 - math.cos(math.pi * p)) / 2
    elif schedule == "linear":
        fall = p
    elif schedule == "constant":
        fall = 0.0
    else:
        raise ConfigError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    return peak - (peak - floor) * fall
