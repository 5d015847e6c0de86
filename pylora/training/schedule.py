"""The learning rate of each step: a linear warm-up, then one of five ways down.

Steps are counted from 1. With w = max(warmup_steps, 1), T steps in all, n = T - w + 1 and the
place after the warm-up p = (step - w) / n:

    step <= w:  lr(step) = peak * (step / w)
    step >  w:  lr(step) = peak - (peak - floor) * fall

    cosine:                fall = (1 - cos(pi p)) / 2                (Loshchilov & Hutter 2017)
    cosine_with_restarts:  the same of (cycles p) modulo 1, so that the rate comes back to its peak
    linear:                fall = p
    constant:              fall = 0
    warmup_stable_decay:   fall = 0 until the last D steps, then (1 - cos(pi q)) / 2 with
                           q = (step - (T + 1 - D)) / D              (Hu et al. 2024, "MiniCPM")

The floor would be reached at step T + 1, so that no step of the run is spent at a rate of zero: the
rates are those of transformers' schedules of the same names for a run of T + 1 steps. The rate is a
function of the step alone: nothing has to be saved to continue a run.
"""

from __future__ import annotations

import math

from pylora.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant", "cosine_with_restarts", "warmup_stable_decay")
# What they are called, too: short names, and transformers' where its own is another.
ALIASES = {
    "wsd": "warmup_stable_decay",
    "restarts": "cosine_with_restarts",
    "constant_with_warmup": "constant",
}
CYCLES = 2  # the fewest that restart at all
DECAY = 0.2  # of the steps after the warm-up, where nobody said: Hägele et al. 2024


def named(schedule: str) -> str:
    """The schedule's own name; any other text is given back as it is."""
    plain = schedule.replace("-", "_") if isinstance(schedule, str) else schedule
    return ALIASES.get(plain, plain)


def decay_of(total_steps: int, warmup_steps: int, decay_steps: int | None) -> int:
    """D of warmup_stable_decay. ConfigError if warm-up and decay are longer than the run."""
    room = total_steps - warmup_steps
    if decay_steps is None:
        return max(1, round(DECAY * room))
    if decay_steps > room:
        raise ConfigError(
            f"decay_steps is {decay_steps} and warmup_steps {warmup_steps}, but the run has only "
            f"{total_steps} steps"
        )
    return decay_steps


def learning_rate(
    step: int,
    total_steps: int,
    *,
    peak: float,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    floor: float = 0.0,
    decay_steps: int | None = None,
    cycles: int | None = None,
) -> float:
    """The rate of `step` (1 .. total_steps); `floor` is a rate, not a fraction of the peak.

    `decay_steps` (None: a fifth of the run) is warmup_stable_decay's, `cycles` (None: 2)
    cosine_with_restarts's. ConfigError for a step outside the run or an unknown schedule.
    """
    if not 1 <= step <= total_steps:
        raise ConfigError(f"step {step} is outside the run, which has steps 1 to {total_steps}")
    warm = max(warmup_steps, 1)
    if step <= warm:
        return peak * (step / warm)
    done, whole = step - warm, total_steps - warm + 1
    if schedule == "cosine":
        fall = _half_wave(done / whole)
    elif schedule == "cosine_with_restarts":
        fall = _half_wave((cycles or CYCLES) * done % whole / whole)  # whole numbers: no rounding
    elif schedule == "linear":
        fall = done / whole
    elif schedule == "constant":
        fall = 0.0
    elif schedule == "warmup_stable_decay":
        decay = decay_of(total_steps, warmup_steps, decay_steps)
        fall = _half_wave(max(0, step - (total_steps + 1 - decay)) / decay)
    else:
        raise ConfigError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")
    return peak - (peak - floor) * fall


def _half_wave(p: float) -> float:
    return (1 - math.cos(math.pi * p)) / 2
