"""What a run says of itself: of each step, and at its end. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pylora.training.evaluate import Evaluation
from pylora.types import LoRA, brief


@dataclass(frozen=True)
class StepInfo:
    """What happened in a step; on_step gets one after each."""

    __repr__ = brief

    step: int  # 1 .. steps
    steps: int  # of the whole run
    epoch: int  # 0, 1, ...
    loss: float  # nll per token that counts, of the step's batch, before the update
    learning_rate: float
    grad_norm: float  # before clipping
    tokens: int  # input tokens of this step
    tokens_seen: int  # of the run
    tokens_per_second: float  # of this step
    seconds: float  # since the run began, without pauses between resumptions
    evaluation: Evaluation | None  # if one was due


@dataclass(frozen=True)
class TrainResult:
    """A finished run. `losses`, `steps`, `tokens` and `seconds` include what was resumed from."""

    losses: list[float]
    steps: int  # that were done
    tokens: int
    seconds: float
    tokens_per_second: float
    adapter: Mapping[str, LoRA]
    evaluation: Evaluation | None  # at the end, if there are eval_examples
    # (step, evaluation) of this process, step 0 before training; not what was resumed from
    evaluations: list[tuple[int, Evaluation]] = field(default_factory=list)
    best_step: int | None = None  # whose adapter was kept, with `best_by`; None: the last
    stopped_early: bool = False  # by `patience`
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a run in out_dir is a run of

    def __repr__(self) -> str:
        losses, e = self.losses, self.evaluation
        fell = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "no loss"
        said = f", evaluation {e.nll:.4f}" if e is not None else ""
        return (
            f"TrainResult({self.steps} steps, {fell}{said}, {self.tokens:,} tokens in "
            f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s)"
        )
