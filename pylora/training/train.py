"""Fine-tuning: the loop from examples to a trained adapter. Only the adapter's arrays are written.

A step is: gradients of the micro-batches, added up in order; the global norm; one AdamW update in
place. Everything that happens is a function of the model, the adapter, the examples and the
TrainConfig, so a run that was interrupted continues bit for bit from its last checkpoint.

`out_dir` gets log.jsonl, checkpoint-NNNNNN/ (checkpoint.py) and, at the end, adapter/, a PEFT
 directory. Work is not distributed over machines.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, TrainingError, expect, wrong_type
from pylora.model.linear import DropKey
from pylora.training import checkpoint
from pylora.training.batching import Step, epoch_steps
from pylora.training.checkpoint import Progress
from pylora.training.config import TrainConfig
from pylora.training.enough import settled, total_steps
from pylora.training.evaluate import Evaluation
from pylora.training.examples import Example, check_examples, digest
from pylora.training.info import StepInfo, TrainResult
from pylora.training.log import Interrupts, Log
from pylora.training.memory import peak_rss_bytes
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.training.schedule import learning_rate
from pylora.training.step import step_gradients
from pylora.training.watching import Measure, Watch, bests, remove_bests
from pylora.types import LoRA

_LOG, _ADAPTER = "log.jsonl", "adapter"

__all__ = ["StepInfo", "TrainConfig", "TrainResult", "step_gradients", "train"]


def train(
    model: Any,
    adapter: Mapping[str, LoRA],
    examples: Sequence[Example],
    config: TrainConfig | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    eval_examples: Sequence[Example] | None = None,
    on_step: Callable[[StepInfo], None] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    measure: Measure | None = None,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
) -> TrainResult:
    """Trains `adapter` in place (and leaves it attached to `model`).

    Without out_dir nothing is written. With `resume` the newest checkpoint in out_dir is continued;
    ConfigError if there is none, or if it is of a run with other settings, data, model or adapter.
    More `steps` or `epochs` make the run longer: what was done stays, and the rate goes on along
    the longer schedule. An out_dir that has a run in it is refused unless `resume` or `overwrite`
    (which removes it).

    eval_examples are looked at before the first step, every `eval_every` steps, and at the end;
    `measure` is called then, too, and its figures and samples stand in the Evaluation, which
    on_evaluation gets with the number of steps done. With `best_by` the adapter ends as it was at
    the best evaluation; that needs out_dir.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP and a KeyboardInterrupt from on_step end the run after the
    step, with a checkpoint, and are raised again. A loss or gradient that is not finite is a
    TrainingError; the adapter then has the values from before the step.
    """
    expect("model", model, "train(model, adapter, examples, config)")
    expect("adapter", adapter, "train(model, adapter, examples, config)")
    expect("examples", examples, "train(model, adapter, examples, config)")
    if config is not None:
        expect("training settings", config, "train(model, adapter, examples, config)")
    if out_dir is not None:
        expect("path", out_dir, "train(out_dir=...)")
    if eval_examples is not None:
        expect("examples", eval_examples, "train(eval_examples=...)")
    if on_step is not None and not callable(on_step):
        wrong_type("train(on_step=...)", "a function of one StepInfo", on_step)
    config = config or TrainConfig()
    check_examples(examples, model.config, "training", config.max_tokens)
    if eval_examples is not None:
        check_examples(eval_examples, model.config, "evaluation")
    if config.best_by is not None and (eval_examples is None or out_dir is None):
        lacking = "eval_examples" if eval_examples is None else "out_dir"
        raise ConfigError(f"best_by needs {lacking}, to find the best adapter, and to keep it in")
    config = settled(config, [len(e) for e in examples], model.config.hidden_size)
    model.attach(adapter)
    run = _Run(model, adapter, examples, config, None if out_dir is None else Path(out_dir))
    run.watch = Watch(model, eval_examples, config, measure)
    run.open(resume, overwrite)
    try:
        return run.finish(on_step, on_evaluation)
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
        examples: Sequence[Example],
        config: TrainConfig,
        out_dir: Path | None,
    ) -> None:
        self.model, self.adapter, self.examples = model, adapter, examples
        self.config, self.out_dir = config, out_dir
        self.optimizer = Optimizer(model.ops, trainable(model.placed), config)
        self.progress = Progress()
        self.saved = 0  # step of the newest checkpoint
        self.saved_at = time.monotonic()  # and when it was written, or the run begun
        self.log: Log | None = None
        self.identity: dict[str, Any] = {}
        self.watch = Watch(model, None, config, None)
        self.steps = total_steps(config, [len(example) for example in examples])
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

    # ---- files --------------------------------------------------------------------------------

    def open(self, resume: bool, overwrite: bool) -> None:
        """Finds the run's beginning: step 0, or the newest checkpoint in out_dir."""
        if self.out_dir is None:
            if resume:
                raise ConfigError("resume needs out_dir, the directory of the run to continue")
            return
        if not hasattr(self.adapter, "save"):
            raise ConfigError(
                "out_dir needs a pylora.Adapter, which can be written as a PEFT directory; a "
                f"{type(self.adapter).__name__} can be trained without out_dir"
            )
        self.identity = {
            **self.config.identity(),
            "backend": self.model.ops.name,
            "precision": self.model.precision_report,
            "base model": checkpoint.fingerprint(self.model),
            "training data": digest(self.examples),
            **{
                f"adapter of {path}": f"rank {lora.rank}, scale {lora.scale!r}, "
                f"dropout {lora.dropout!r}"
                for path, lora in self.adapter.items()
            },
        }
        check_out_dir(self.out_dir, resume=resume, overwrite=overwrite)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out_dir / _LOG)
        self.watch.log, self.watch.out_dir = self.log, self.out_dir
        found = checkpoint.checkpoints(self.out_dir)
        if resume:
            self._restore(found[-1])
            self.log.cut(self.progress.step)
        else:
            checkpoint.remove(found)
            remove_bests(self.out_dir)
            self.log.cut(-1)

    def _restore(self, path: Path) -> None:
        progress, identity = checkpoint.read(path)
        checkpoint.refuse_another_run(path, identity, self.identity)
        if progress.step > self.steps:
            raise ConfigError(
                f"{path} is after step {progress.step}, and the run is to have {self.steps} steps; "
                "what was done cannot be taken back: ask for more steps, or start a new run"
            )
        stored = type(self.adapter).load(path, self.model.config.modules())  # type: ignore[attr-defined]
        checkpoint.restore_arrays(str(path), trainable(stored), trainable(self.adapter))
        self.model.attach(self.adapter)
        self.optimizer.parameters = trainable(self.model.placed)
        moments = {name: np.empty_like(a) for name, a in self.optimizer.state().items()}
        checkpoint.restore_moments(path, moments)
        self.optimizer.restore(moments)
        self.progress, self.saved = progress, progress.step

    def save(self) -> None:
        """Writes a checkpoint of the present step, unless that is on disk already."""
        if self.out_dir is not None and self.saved != self.progress.step:
            self.model.collect()
            state, keep = self.optimizer.state(), self.config.keep
            checkpoint.write(self.out_dir, self.adapter, state, self.progress, self.identity, keep)
            self.saved, self.saved_at = self.progress.step, time.monotonic()
            self.watch.tidy()

    # ---- the loop -----------------------------------------------------------------------------

    def finish(
        self,
        on_step: Callable[[StepInfo], None] | None,
        on_evaluation: Callable[[int, Evaluation], None] | None,
    ) -> TrainResult:
        p, watch, evaluation = self.progress, self.watch, None

        def look() -> Evaluation:
            found = watch.look(p.step)
            if on_evaluation is not None:
                on_evaluation(p.step, found)
            return found

        with Interrupts() as interrupts:
            if p.step == 0 and watch.due(0, last=True):
                look()
            interrupts.check()
            for step in self._remaining():
                info = self._step(step)
                self._record(info)
                last = p.step == self.steps
                if watch.due(p.step, last):
                    evaluation = look()
                    self.model.collect()
                    watch.judge(evaluation, p, self.adapter)
                    info = replace(info, evaluation=evaluation)
                try:
                    if on_step is not None:
                        on_step(info)
                    interrupts.check()
                except (KeyboardInterrupt, SystemExit):
                    self.save()
                    raise
                if last or watch.exhausted(p) or self._due():
                    self.save()
        return self._end(evaluation)

    def _due(self) -> bool:
        """Whether a checkpoint is, by steps or by time."""
        every, minutes = self.config.save_every, self.config.save_minutes
        by_steps = every is not None and self.progress.step % every == 0
        waited = time.monotonic() - self.saved_at
        return by_steps or (minutes is not None and waited >= 60 * minutes)

    def _end(self, evaluation: Evaluation | None) -> TrainResult:
        """Writes the result: the last adapter, or the best one, which the model then has."""
        p = self.progress
        self.model.collect()
        best = self.watch.best_folder(p)
        if best is not None:
            kept = type(self.adapter).load(best, self.model.config.modules())  # type: ignore[attr-defined]
            checkpoint.restore_arrays(str(best), trainable(kept), trainable(self.adapter))
            self.model.attach(self.adapter)
            evaluation = dict(self.watch.seen).get(p.best_step)
        if evaluation is None and self.watch.examples:  # a finished run was resumed
            evaluation = self.watch.now()
        if self.out_dir is not None:
            self.adapter.save(self.out_dir / _ADAPTER)  # type: ignore[attr-defined]
            for step in bests(self.out_dir)[:-1]:
                shutil.rmtree(self.out_dir / f"best-{step:06d}")
        return TrainResult(
            losses=list(p.losses),
            steps=p.step,
            tokens=p.tokens,
            seconds=p.seconds,
            tokens_per_second=p.tokens / p.seconds if p.seconds > 0 else 0.0,
            adapter=self.adapter,
            evaluation=evaluation,
            evaluations=self.watch.seen,
            best_step=p.best_step if best is not None else None,
            stopped_early=p.step < self.steps,
        )

    def _remaining(self) -> Iterator[Step]:
        """The steps still to do; progress is moved on after each."""
        p = self.progress
        while p.step < self.steps and not self.watch.exhausted(p):
            epoch = self._epoch(p.epoch)
            while p.position < len(epoch):
                yield epoch[p.position]
                if p.step == self.steps or self.watch.exhausted(p):
                    return
            p.epoch, p.position = p.epoch + 1, 0

    def _step(self, step: Step) -> StepInfo:
        """One update, and progress past it."""
        c, p, began = self.config, self.progress, time.perf_counter()
        number = p.step + 1
        assert c.learning_rate is not None  # settled
        loss, rows, grads = step_gradients(
            self.model,
            self.examples,
            step,
            drop=DropKey(c.seed, number),
            recompute=c.recompute,
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
            eta = info.seconds / info.step * (self.steps - info.step)
            precision = self.model.precision_report
            line |= {"seconds": info.seconds, "eta_seconds": eta}
            self.log.add({**line, "memory_bytes": peak_rss_bytes(), "precision": precision})
