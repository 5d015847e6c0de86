"""What a training run asks of its objective; and the usual one, the next token.

A step's loss is a mean over the whole step and its gradient is that of this mean, however the step
is cut into micro-batches. An objective knows no optimizer, no file of a run and no screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import Load
from pylora.adapters.plan import Plan
from pylora.adapters.whole import fresh_whole
from pylora.model.linear import DropKey, Grads
from pylora.training.batching import Step
from pylora.training.evaluate import Evaluation, evaluate
from pylora.training.examples import check_examples, digest
from pylora.training.ranks import ALONE, Ranks
from pylora.training.step import step_gradients
from pylora.types import Array


class Objective(Protocol):
    """`items` are whatever the objective is about, each with a length in rows and a `where`."""

    @property
    def name(self) -> str: ...

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of a run beside the items, in JSON values."""

    def digest(self, items: Sequence[Any]) -> str:
        """A digest of the items, in order."""

    def check(
        self, items: Sequence[Any], model: Any, what: str, max_tokens: int | None = None
    ) -> None:
        """DataError, naming its place, for an item that the model cannot take."""

    def prepare(self, model: Any, items: Sequence[Any], out_dir: Path | None) -> None:
        """Computes what is computed once. The model's adapter is attached anew where it had to be
        taken away. `out_dir` may keep what was computed, for a resumed run."""

    def fresh(
        self, plan: Plan, config: LoraConfig, seed: int, model: Any, items: Any, base: Load | None
    ) -> Adapter:
        """The adapter that a new run begins with."""

    def parameters(self, model: Any) -> Mapping[str, Array]:
        """Arrays that are trained beside the adapter, by name; where the backend computes."""

    def gradients(
        self, model: Any, items: Sequence[Any], step: Step, drop: DropKey | None, recompute: bool
    ) -> tuple[float, int, Grads]:
        """(loss, rows, Grads) of a step, see `step_gradients`."""

    def evaluate(self, model: Any, items: Sequence[Any], batch_size: int) -> Evaluation:
        """How well the model does, without dropout."""


class Plain:
    """What an objective has that needs nothing beside the adapter."""

    def identity(self) -> dict[str, Any]:
        return {}

    def prepare(self, model: Any, items: Sequence[Any], out_dir: Path | None) -> None:
        pass

    def fresh(
        self, plan: Plan, config: LoraConfig, seed: int, model: Any, items: Any, base: Load | None
    ) -> Adapter:
        whole = None if base is None else fresh_whole(config, model.home_config, base)
        return Adapter.init(plan, config, seed, base=base, whole=whole)

    def parameters(self, model: Any) -> Mapping[str, Array]:
        return {}


class NextToken(Plain):
    """The mean negative log-likelihood of the labels of `Example`s."""

    name = "sft"

    def __init__(self, ranks: Ranks = ALONE, smoothing: float = 0.0) -> None:
        """`ranks`: the processes that share the work. `smoothing`: of the labels that are trained
        on; evaluation looks at the labels as they are."""
        self.ranks, self.smoothing = ranks, smoothing

    def digest(self, items: Sequence[Any]) -> str:
        return digest(items)

    def check(
        self, items: Sequence[Any], model: Any, what: str, max_tokens: int | None = None
    ) -> None:
        check_examples(items, model.config, what, max_tokens)

    def gradients(
        self, model: Any, items: Sequence[Any], step: Step, drop: DropKey | None, recompute: bool
    ) -> tuple[float, int, Grads]:
        return step_gradients(
            model, items, step, drop=drop, recompute=recompute, smoothing=self.smoothing,
            ranks=self.ranks,
        )  # fmt: skip

    def evaluate(self, model: Any, items: Sequence[Any], batch_size: int) -> Evaluation:
        return evaluate(model, items, batch_size=batch_size, ranks=self.ranks)
