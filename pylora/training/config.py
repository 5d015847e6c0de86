"""The settings of a training run, checked when they are made. Nothing is read or trained here."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pylora.errors import ConfigError
from pylora.training.schedule import ALIASES, SCHEDULES, named
from pylora.types import brief

# Settings that say when to look and what to keep. A run may be resumed with other values of these.
_BESIDE_THE_POINT = frozenset(
    {
        "eval_every", "save_every", "save_minutes", "log_every", "keep", "best_by", "patience",
    }
)  # fmt: skip

# That checkpoints of older versions say nothing of.
_NEWER = frozenset(
    {
        "decay_steps", "cycles", "optimizer", "label_smoothing_factor", "neftune_noise_alpha",
        "rank_dropout",
    }
)  # fmt: skip
# What an optimizer is called here and elsewhere -> which it is.
OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "adamw8bit": "adamw_8bit",
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Raises ConfigError, naming the field, for a value out of range.

    A step is one update of the adapter from `batch_size` examples, computed in `accumulation`
    micro-batches, whose gradient is that of the whole batch. With `packing` a step is
    `accumulation` micro-batches, each filled with examples up to `max_tokens` tokens, and
    `batch_size` is not used. Dropout is a property of the adapter (`lora_dropout`).
    """

    __repr__ = brief

    learning_rate: float | None = None  # the peak; None: chosen by the model's width (enough.py)
    epochs: int | None = None  # passes over the examples; None: `steps`, or enough of them
    steps: int | None = None  # updates in all
    batch_size: int = 8  # examples per step
    accumulation: int = 1  # micro-batches per step
    packing: bool = False
    max_tokens: int | None = None  # per micro-batch; needed by packing
    schedule: str = "cosine"  # see schedule.py
    warmup_steps: int = 0
    floor: float = 0.0  # the rate at the end, as a fraction of learning_rate
    decay_steps: int | None = None  # of warmup_stable_decay; None: a fifth of the run
    cycles: int | None = None  # of cosine_with_restarts; None: 2
    optimizer: str = "adamw"  # or "adamw_8bit": a quarter of its memory (optimizer8.py)
    weight_decay: float = 0.0  # decoupled (AdamW), of A and B, never of biases
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # the global gradient norm is clipped to this; None: not
    lora_plus_ratio: float = 1.0  # the rate of B is this times that of A (Hayou et al. 2024)
    label_smoothing_factor: float = 0.0  # how much of each label is spread over all tokens
    neftune_noise_alpha: float = 0.0  # of the noise on embeddings (model/noise.py); 0: none
    rank_dropout: float = 0.0  # how often a step goes without a rank of a module (rankdrop.py)
    recompute: bool = False  # gradient checkpointing: less memory, one more forward pass
    seed: int = 0  # of the order of the examples and of dropout
    log_every: int = 1  # steps between lines of the log
    eval_every: int | None = None  # steps between evaluations; one at the end in any case
    save_every: int | None = None  # steps between checkpoints; one at the end in any case
    save_minutes: float | None = 10.0  # and after so many minutes without one; None: not
    keep: int = 2  # checkpoints kept
    best_by: str | None = None  # "loss" or a metric: the best evaluation's adapter is the result
    patience: int | None = None  # evaluations without a better one, after which the run ends

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_every", "keep"):
            self._integer(name, at_least=1)
        for name in (
            "epochs", "steps", "max_tokens", "eval_every", "save_every", "patience",
            "decay_steps", "cycles",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                self._integer(name, at_least=1)
        self._integer("warmup_steps", at_least=0)
        self._integer("seed", at_least=0)
        if self.seed >= 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be below 2**64")
        for name in ("packing", "recompute"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        for name in ("learning_rate", "save_minutes"):
            if getattr(self, name) is not None:
                self._number(name, above=0)
        self._number("floor", at_least=0, at_most=1)
        self._number("weight_decay", at_least=0)
        self._number("beta1", at_least=0, below=1)
        self._number("beta2", at_least=0, below=1)
        self._number("eps", above=0)
        self._number("lora_plus_ratio", above=0)
        if self.max_grad_norm is not None:
            self._number("max_grad_norm", above=0)
        for name in ("label_smoothing_factor", "rank_dropout"):
            self._number(name, at_least=0, below=1)
        self._number("neftune_noise_alpha", at_least=0)
        object.__setattr__(self, "schedule", named(self.schedule))
        object.__setattr__(self, "optimizer", OPTIMIZERS.get(str(self.optimizer), self.optimizer))
        self._one_of("schedule", SCHEDULES, ALIASES)
        self._one_of("optimizer", tuple(dict.fromkeys(OPTIMIZERS.values())), OPTIMIZERS)
        if self.decay_steps is not None and self.schedule != "warmup_stable_decay":
            raise ConfigError(f"decay_steps is for warmup_stable_decay, not for {self.schedule}")
        if self.cycles is not None and self.schedule != "cosine_with_restarts":
            raise ConfigError(f"cycles is for cosine_with_restarts, not for {self.schedule}")
        if self.best_by is not None and (not isinstance(self.best_by, str) or not self.best_by):
            raise ConfigError(f"best_by is {self.best_by!r}; it must be 'loss' or a metric's name")
        if self.patience is not None and self.best_by is None:
            raise ConfigError("patience needs best_by, the figure that must get better")
        if self.packing and self.max_tokens is None:
            raise ConfigError("packing needs max_tokens, the number of tokens to fill up to")
        if not self.packing and self.accumulation > self.batch_size:
            raise ConfigError(
                f"accumulation is {self.accumulation}, but a step of batch_size {self.batch_size} "
                "examples cannot be cut into more parts than that; batch_size is the whole step's"
            )
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps is {self.warmup_steps}, but the run has only {self.steps} steps"
            )

    def _one_of(self, name: str, known: Sequence[str], also: Iterable[str]) -> None:
        value = getattr(self, name)
        if value not in known:
            near = difflib.get_close_matches(str(value), [*known, *also], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(known)}{hint}")

    def _integer(self, name: str, *, at_least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} is {value!r}; it must be a whole number")
        if value < at_least:
            raise ConfigError(f"{name} is {value}; it must be at least {at_least}")

    def _number(
        self,
        name: str,
        *,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
    ) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} is {value!r}; it must be a number")
        limits = []
        for text, limit, kept in (
            ("at least", at_least, at_least is None or value >= at_least),
            ("above", above, above is None or value > above),
            ("at most", at_most, at_most is None or value <= at_most),
            ("below", below, below is None or value < below),
        ):
            if limit is not None:
                limits.append((f"{text} {limit:g}", kept))
        if not math.isfinite(value) or not all(kept for _, kept in limits):
            wanted = " and ".join(text for text, _ in limits)
            raise ConfigError(f"{name} is {value:g}; it must be finite and {wanted}")

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the numbers of a run: all but when to log, evaluate and save.

        Those that older runs did not know are left out where they change nothing."""
        blank = TrainConfig.__dataclass_fields__
        return {
            name: value
            for name, value in self.to_json().items()
            if name not in _BESIDE_THE_POINT
            and not (name in _NEWER and value == blank[name].default)
        }
