"""Fine-tuning: the loop from examples to a trained adapter. Only the adapter's arrays are written.

A step is: gradients of the micro-batches, added up in order; the global norm; one AdamW update in
place. Everything that happens is a function of the model, the adapter, the examples and the
TrainConfig, so a run that was interrupted continues bit for bit from its last checkpoint.

`out_dir` gets log.jsonl, checkpoint-NNNNNN/ (checkpoint.py) and, at the end, adapter/, a PEFT
 directory. Several processes (ranks.py) share the micro-batches of each step; the first one writes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, TrainingError, expect, wrong_type
from pylora.model.linear import DropKey
from pylora.training import checkpoint
from pylora.training.batching import Step, epoch_steps
from pylora.training.checkpoint import Progress
from pylora.training.config import TrainConfig
from pylora.training.evaluate import Evaluation
from pylora.training.log import Interrupts, Log
from pylora.training.objectives.base import NextToken, Objective
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.training.ranks import ALONE, Ranks, check_share, same_everywhere
from pylora.training.schedule import learning_rate
from pylora.training.step import step_gradients
from pylora.types import LoRA, brief

_LOG, _ADAPTER = "log.jsonl", "adapter"

__all__ = ["StepInfo", "TrainConfig", "TrainResult", "step_gradients", "train"]


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
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    adapter: Mapping[str, LoRA]
    evaluation: Evaluation | None  # at the end, if there are eval_examples

    def __repr__(self) -> str:
        losses, e = self.losses, self.evaluation
        fell = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "no loss"
        said = f", evaluation {e.nll:.4f}" if e is not None else ""
        return (
            f"TrainResult({self.steps} steps, {fell}{said}, {self.tokens:,} tokens in "
            f"{self.seconds:.1f} s, {self.tokens_per_second:.0f} tokens/s)"
        )


def train(
    model: Any,
    adapter: Mapping[str, LoRA],
    examples: Sequence[Any],
    config: TrainConfig | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    eval_examples: Sequence[Any] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    objective: Objective | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Trains `adapter` in place (and leaves it attached to `model`).

    `examples` are `Example`s, or what `objective` (training/objectives/) is about. Without out_dir
    nothing is written. With `resume` the newest checkpoint in out_dir is continued;
    ConfigError if there is none, or if it is of a run with other settings, data, model or adapter.
    An out_dir that has a run in it is refused unless `resume` or `overwrite` (which removes it).

    With `ranks` several processes that all call this train together (pylora.training.mpi.world()):
    the adapter has the same bits as with one process that was given the same `accumulation`, which
    must be at least their number. Rank 0 writes out_dir; on_step is called where it is given.

    SIGINT (Ctrl-C) and a KeyboardInterrupt from on_step end the run after the step, with a
    checkpoint, and are raised again. A loss or gradient that is not finite is a TrainingError; the
    adapter then has the values from before the step.
    """
    expect("model", model, "train(model, adapter, examples, config)")
    expect("adapter", adapter, "train(model, adapter, examples, config)")
    if objective is None:
        expect("examples", examples, "train(model, adapter, examples, config)")
    if config is not None:
        expect("training settings", config, "train(model, adapter, examples, config)")
    if out_dir is not None:
        expect("path", out_dir, "train(out_dir=...)")
    if eval_examples is not None and objective is None:
        expect("examples", eval_examples, "train(eval_examples=...)")
    if on_step is not None and not callable(on_step):
        wrong_type("train(on_step=...)", "a function of one StepInfo", on_step)
    config = config or TrainConfig()
    if objective is None or isinstance(objective, NextToken):
        objective = NextToken(ranks)
    elif ranks.size > 1:
        raise ConfigError(
            f"objective {objective.name} is trained by one process; {ranks.size} were started"
        )
    objective.check(examples, model, "training", config.max_tokens)
    if eval_examples is not None:
        objective.check(eval_examples, model, "evaluation")
    model.attach(adapter)
    where = None if out_dir is None else Path(out_dir)
    run = _Run(model, adapter, examples, config, where, objective, ranks)
    run.open(resume, overwrite)
    run.prepare([*examples, *(eval_examples or ())])
    try:
        return run.finish(eval_examples, on_step)
    finally:
        model.collect()  # however it ends, the adapter's own arrays are as far as it came


def check_out_dir(
    out_dir: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> None:
    """ConfigError unless a run can be begun (or, with `resume`, continued) in this directory.

    What `train` asks itself; to be asked before a model is loaded. Nothing is read or written.
    """
    where = Path(out_dir)
    if resume and overwrite:
        raise ConfigError("resume continues the run in out_dir, overwrite removes it: choose one")
    found = checkpoint.checkpoints(where)
    if resume and not found:
        there = "there is no such directory" if not where.exists() else "it has no checkpoint"
        raise ConfigError(f"{where}: {there} to resume from; start the run without resume")
    if resume or overwrite:
        return
    if found or (where / _LOG).exists():
        raise ConfigError(
            f"{where} already holds a training run; resume it, overwrite it, or give another "
            "directory"
        )
    if (where / _ADAPTER).exists():
        raise ConfigError(
            f"{where / _ADAPTER} is there already, and would be replaced; overwrite it, or give "
            "another directory"
        )


class _Run:
    """One run: what is trained, how far it is, and where it is written."""

    def __init__(
        self,
        model: Any,
        adapter: Mapping[str, LoRA],
        examples: Sequence[Any],
        config: TrainConfig,
        out_dir: Path | None,
        objective: Objective,
        ranks: Ranks = ALONE,
    ) -> None:
        check_share(ranks, config.accumulation)
        self.ranks = ranks
        self.model, self.adapter, self.examples = model, adapter, examples
        self.config, self.out_dir, self.objective = config, out_dir, objective
        self.optimizer = Optimizer(model.ops, self._trained(), config)
        self.progress = Progress()
        self.saved = 0  # step of the newest checkpoint
        self.log: Log | None = None
        self.identity: dict[str, Any] = {}
        self.steps = config.steps or self._all_epochs()
        if config.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps is {config.warmup_steps}, but the run has only {self.steps} steps"
            )

    def _epoch(self, epoch: int) -> list[Step]:
        c = self.config
        return epoch_steps(
            [len(example) for example in self.examples],
            seed=c.seed,
            epoch=epoch,
            batch_size=c.batch_size,
            accumulation=c.accumulation,
            packing=c.packing,
            max_tokens=c.max_tokens,
        )

    def _all_epochs(self) -> int:
        """Steps of all epochs. With packing epochs differ, without they do not."""
        if self.config.packing:
            return sum(len(self._epoch(e)) for e in range(self.config.epochs))
        return self.config.epochs * math.ceil(len(self.examples) / self.config.batch_size)

    # ---- files --------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> None:
        """Finds the run's beginning: step 0, or the newest checkpoint in out_dir."""
        if self.out_dir is None:
            if resume:
                raise ConfigError("resume needs out_dir, the directory of the run to continue")
            if self.ranks.size > 1:
                same_everywhere(self.ranks, self._identity())
            return
        if not hasattr(self.adapter, "save"):
            raise ConfigError(
                "out_dir needs a pylora.Adapter, which can be written as a PEFT directory; a "
                f"{type(self.adapter).__name__} can be trained without out_dir"
            )
        self.identity = self._identity()
        same_everywhere(self.ranks, self.identity)
        self.ranks.first(lambda: self._open_files(resume, overwrite))
        if resume and self.ranks.size > 1:
            self._follow()

    def _identity(self) -> dict[str, Any]:
        """What the run is a run of: equal in all its processes, and where it is resumed."""
        return {
            **self.config.identity(),
            **self.objective.identity(),
            "backend": self.model.ops.name,
            "precision": self.model.precision_report,
            "base model": checkpoint.fingerprint(self.model),
            "training data": self.objective.digest(self.examples),
            **{
                f"adapter of {path}": f"rank {lora.rank}, scale {lora.scale!r}, "
                f"dropout {lora.dropout!r}"
                for path, lora in self.adapter.items()
            },
        }

    def _open_files(self, resume: bool, overwrite: bool) -> None:
        """What rank 0 does in out_dir before the first step."""
        assert self.out_dir is not None
        check_out_dir(self.out_dir, resume=resume, overwrite=overwrite)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out_dir / _LOG)
        found = checkpoint.checkpoints(self.out_dir)
        if resume:
            self._restore(found[-1])
            self.log.cut(self.progress.step)
        else:
            checkpoint.remove(found)
            self.log.cut(-1)

    def _follow(self) -> None:
        """Brings every rank to where rank 0 is: its arrays, its moments, its progress."""
        self.progress = self.ranks.gather(self.progress)[0]
        self.saved = self.progress.step
        arrays, state = trainable(self.adapter), self.optimizer.state()
        self.ranks.copy([*arrays.values(), *state.values()])
        self.model.attach(self.adapter)
        self.optimizer.parameters = self._trained()
        self.optimizer.restore(state)

    def _restore(self, path: Path) -> None:
        progress, identity = checkpoint.read(path)
        checkpoint.refuse_another_run(path, identity, self.identity)
        stored = type(self.adapter).load(path, self.model.config.modules())  # type: ignore[attr-defined]
        checkpoint.restore_arrays(str(path), trainable(stored), trainable(self.adapter))
        self.model.attach(self.adapter)
        self.optimizer.parameters = self._trained()
        moments = {name: np.empty_like(a) for name, a in self.optimizer.state().items()}
        checkpoint.restore_moments(path, moments)
        self.optimizer.restore(moments)
        self.progress, self.saved = progress, progress.step

    def save(self) -> None:
        """Writes a checkpoint of the present step, unless that is on disk already."""
        if self.out_dir is not None and self.saved != self.progress.step:
            self.ranks.first(self._write)
            self.saved = self.progress.step

    def _write(self) -> None:
        assert self.out_dir is not None
        self.model.collect()
        state, keep = self.optimizer.state(), self.config.keep
        checkpoint.write(self.out_dir, self.adapter, state, self.progress, self.identity, keep)

    def _trained(self) -> dict[str, Any]:
        """The arrays that are trained, where the backend computes."""
        return {**trainable(self.model.placed), **self.objective.parameters(self.model)}

    def prepare(self, examples: Sequence[Any]) -> None:
        """What the objective computes once."""
        self.objective.prepare(self.model, examples, self.out_dir)
        self.optimizer.parameters = self._trained()  # the adapter was away meanwhile

    # ---- the loop -----------------------------------------------------------------------------

    def finish(
        self,
        eval_examples: Sequence[Any] | None,
        on_step: Callable[[StepInfo], None] | None,
    ) -> TrainResult:
        c, p, evaluation = self.config, self.progress, None
        with Interrupts() as interrupts:
            for step in self._remaining():
                info = self._step(step)
                last = p.step == self.steps
                if eval_examples and (last or (c.eval_every and p.step % c.eval_every == 0)):
                    evaluation = self._evaluate(eval_examples)
                    info = StepInfo(**{**vars(info), "evaluation": evaluation})
                self._record(info)
                self._between(info, on_step, interrupts)
                if last or (c.save_every and p.step % c.save_every == 0):
                    self.save()
        if eval_examples and evaluation is None:  # a finished run was resumed
            evaluation = self._evaluate(eval_examples)
        self.model.collect()
        if self.out_dir is not None:
            target = self.out_dir / _ADAPTER
            self.ranks.first(lambda: self.adapter.save(target))  # type: ignore[attr-defined]
        rate = p.tokens / p.seconds if p.seconds > 0 else 0.0
        return TrainResult(
            list(p.losses), p.step, p.tokens, p.seconds, rate, self.adapter, evaluation
        )

    def _between(
        self, info: StepInfo, on_step: Callable[[StepInfo], None] | None, interrupts: Interrupts
    ) -> None:
        """Shows a step, and ends the run if a process was asked to: on every rank then."""
        stop: KeyboardInterrupt | None = None
        try:
            if on_step is not None:
                on_step(info)
            interrupts.check()
        except KeyboardInterrupt as asked:
            stop = asked
        asked_of = [i for i, one in enumerate(self.ranks.gather(stop is not None)) if one]
        if asked_of:
            self.save()
            raise stop or KeyboardInterrupt(f"rank {asked_of[0]} was interrupted")

    def _evaluate(self, examples: Sequence[Any]) -> Evaluation:
        return self.objective.evaluate(self.model, examples, self.config.batch_size)

    def _remaining(self) -> Iterator[Step]:
        """The steps still to do; progress is moved on after each."""
        p = self.progress
        while p.step < self.steps:
            epoch = self._epoch(p.epoch)
            while p.position < len(epoch):
                yield epoch[p.position]
                if p.step == self.steps:
                    return
            p.epoch, p.position = p.epoch + 1, 0

    def _step(self, step: Step) -> StepInfo:
        """One update, and progress past it."""
        c, p, began = self.config, self.progress, time.perf_counter()
        number = p.step + 1
        loss, rows, grads = self.objective.gradients(
            self.model, self.examples, step, DropKey(c.seed, number), c.recompute
        )
        named = gradients(grads, self.optimizer.parameters)
        norm = self.optimizer.norm(named)
        rate = learning_rate(
            number,
            self.steps,
            peak=c.learning_rate,
            schedule=c.schedule,
            warmup_steps=c.warmup_steps,
            floor=c.floor * c.learning_rate,
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(self._diverged(number, loss, norm, rate))
        self.optimizer.update(named, norm, number, rate)
        seconds = time.perf_counter() - began
        p.step, p.position, p.tokens = number, p.position + 1, p.tokens + rows
        p.seconds += seconds
        p.losses.append(loss)
        return StepInfo(
            step=number,
            steps=self.steps,
            epoch=p.epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens=rows,
            tokens_seen=p.tokens,
            tokens_per_second=rows / max(seconds, 1e-9),
            seconds=p.seconds,
            evaluation=None,
        )

    def _diverged(self, step: int, loss: float, norm: float, rate: float) -> str:
        if self.out_dir is None:
            kept = "The adapter has the values from before this step"
        elif self.saved:
            kept = f"The last good checkpoint is {checkpoint.path_of(self.out_dir, self.saved)}"
        else:
            kept = "No checkpoint was written before it"
        advice = "Lower learning_rate or max_grad_norm, or use more warmup_steps"
        if step == 1:  # nothing has been learnt yet, so it is not the rate
            advice = "Nothing was updated yet: look for NaN in the base weights or the adapter"
        return (
            f"training diverged at step {step}: the loss is {loss:g}, the gradient norm {norm:g}, "
            f"the learning rate {rate:g}. {kept}. {advice}"
        )

    def _record(self, info: StepInfo) -> None:
        if self.log is None:
            return
        if info.step % self.config.log_every == 0 or info.step == self.steps:
            line = {"step": info.step, "epoch": info.epoch, "loss": info.loss}
            line |= {"learning_rate": info.learning_rate, "grad_norm": info.grad_norm}
            line |= {"tokens": info.tokens_seen, "tokens_per_second": info.tokens_per_second}
            precision = self.model.precision_report
            self.log.add({**line, "seconds": info.seconds, "precision": precision})
        if info.evaluation is not None:
            e = info.evaluation
            perplexity = e.perplexity if math.isfinite(e.perplexity) else None
            said: dict[str, Any] = {
                "step": info.step,
                "eval_loss": e.nll,
                "eval_perplexity": perplexity,
            }
            self.log.add(said | {f"eval_{name}": value for name, value in e.metrics.items()})
