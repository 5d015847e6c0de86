"""The numbers of the objectives, checked when they are made, and what each is by default."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from pylora.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Each objective uses some of these, under the names that TRL has for them (beta is λ of ORPO
    and τ of IPO). ConfigError, naming the field, for a value out of range."""

    beta: float = 0.1
    label_smoothing: float = 0.0  # how often a preference is wrong
    gamma: float = 0.5  # SimPO: the margin that the chosen answer should have
    desirable_weight: float = 1.0  # KTO
    undesirable_weight: float = 1.0
    temperature: float = 1.0  # distill
    mix: float = 0.0  # distill: the weight of the labels themselves

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{field.name} is {value!r}; it must be a number")
            if not math.isfinite(value):
                raise ConfigError(f"{field.name} is {value!r}; it must be finite")
        for name, low, high in (
            ("mix", 0.0, 1.0),
            ("label_smoothing", 0.0, 0.5),
            ("gamma", 0.0, math.inf),
            ("desirable_weight", 0.0, math.inf),
            ("undesirable_weight", 0.0, math.inf),
        ):
            if not low <= getattr(self, name) < high:
                raise ConfigError(
                    f"{name} is {getattr(self, name):g}; it must be at least {low:g}"
                    + (f" and below {high:g}" if high < math.inf else "")
                )
        for name in ("beta", "temperature"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name):g}; it must be above 0")
        if not (self.desirable_weight or self.undesirable_weight):
            raise ConfigError(
                "desirable_weight and undesirable_weight are both 0: nothing is learnt"
            )
