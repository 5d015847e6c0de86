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
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import ConfigError, TrainingError, expect, wrong_type
from pylora.model.linear import DropKey
from pylora.model.whole import whole_of
from pylora.training import checkpoint
from pylora.training.batching import Step, epoch_of
from pylora.training.checkpoint import Progress
from pylora.training.config import TrainConfig
from pylora.training.enough import settled, total_steps
from pylora.training.evaluate import Evaluation
from pylora.training.held import Held
from pylora.training.info import StepInfo, TrainResult
from pylora.training.log import Interrupts, Log, step_line
from pylora.training.objectives.base import NextToken, Objective
from pylora.training.optimizer import gradients, trainable
from pylora.training.optimizer8 import optimizer_of
from pylora.training.places import ADAPTER, LOG, check_out_dir
from pylora.training.rankdrop import RankDropout
from pylora.training.ranks import ALONE, Ranks, check_share, same_everywhere
from pylora.training.schedule import decay_of, learning_rate
from pylora.training.step import step_gradients
from pylora.training.watching import Measure, Watch, bests, remove_bests
from pylora.types import LoRA

__all__ = [
    "StepInfo", "TrainConfig", "TrainResult", "check_out_dir", "step_gradients", "train",
]  # fmt: skip


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
    measure: Measure | None = None,
    on_evaluation: Callable[[int, Evaluation], None] | None = None,
    objective: Objective | None = None,
    ranks: Ranks = ALONE,
) -> TrainResult:
    """Trains `adapter` in place (and leaves it attached to `model`).

    `examples` are `Example`s, or what `objective` (training/objectives/) is about. Without out_dir
    nothing is written. With `resume` the newest checkpoint in out_dir is continued;
    ConfigError if there is none, or if it is of a run with other settings, data, model or adapter.
    More `steps` or `epochs` make the run longer: what was done stays, and the rate goes on along
    the longer schedule. An out_dir that has a run in it is refused unless `resume` or `overwrite`
    (which removes it).

    eval_examples are looked at before the first step, every `eval_every` steps, and at the end;
    `measure` is called then, too, and its figures and samples stand in the Evaluation, which
    on_evaluation gets with the number of steps done. With `best_by` the adapter ends as it was at
    the best evaluation; that needs out_dir.

    With `ranks` several processes that all call this train together (pylora.training.mpi.world()):
    the adapter has the same bits as with one process that was given the same `accumulation`, which
    must be at least their number. Rank 0 writes out_dir, and measures; on_step and on_evaluation
    are called where they are given.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP and a KeyboardInterrupt from on_step end the run after the
    step, with a checkpoint, and are raised again. A loss or gradient that is not finite is a
    TrainingError; the adapter then has the values from before the step.
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
        objective = NextToken(ranks, config.label_smoothing_factor)
    elif config.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor is for the next token (sft); objective {objective.name} has "
            "no labels to smooth with it"
        )
    elif ranks.size > 1:
        raise ConfigError(
            f"objective {objective.name} is trained by one process; {ranks.size} were started"
        )
    objective.check(examples, model, "training", config.max_tokens)
    if eval_examples is not None:
        objective.check(eval_examples, model, "evaluation")
    if config.best_by is not None and (eval_examples is None or out_dir is None):
        lacking = "eval_examples" if eval_examples is None else "out_dir"
        raise ConfigError(f"best_by needs {lacking}, to find the best adapter, and to keep it in")
    config = settled(config, [len(e) for e in examples], model.config.hidden_size)
    model.attach(adapter)
    where = None if out_dir is None else Path(out_dir)
    watch = Watch(model, eval_examples, config, measure, objective, ranks)
    run = _Run(model, adapter, examples, config, where, objective, watch, ranks)
    run.open(resume, overwrite)
    run.prepare([*examples, *(eval_examples or ())])
    try:
        return run.finish(on_step, on_evaluation)
    finally:
        model.collect()  # however it ends, the adapter's own arrays are as far as it came


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
        watch: Watch,
        ranks: Ranks,
    ) -> None:
        check_share(ranks, config.accumulation)
        self.ranks, self.watch = ranks, watch
        self.model, self.adapter, self.examples = model, adapter, examples
        self.config, self.out_dir, self.objective = config, out_dir, objective
        self.optimizer = optimizer_of(model.ops, self._trained(), config)
        self.held = Held(getattr(adapter, "held", {}), self.optimizer.parameters)
        self.progress = Progress()
        self.saved = 0  # step of the newest checkpoint
        self.saved_at = time.monotonic()  # and when it was written, or the run begun
        self.log: Log | None = None
        self.identity: dict[str, Any] = {}
        self.steps = total_steps(config, [len(example) for example in examples])
        if config.warmup_steps > self.steps:
            raise ConfigError(
                f"warmup_steps is {config.warmup_steps}, but the run has only {self.steps} steps"
            )
        decay_of(self.steps, config.warmup_steps, config.decay_steps)  # refuses what is too long

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
            **{
                f"whole {name}": f"{list(array.shape)}"
                for name, array in getattr(self.model.whole, "trained", {}).items()
            },
        }

    def _open_files(self, resume: bool, overwrite: bool) -> None:
        """What rank 0 does in out_dir before the first step."""
        assert self.out_dir is not None
        check_out_dir(self.out_dir, resume=resume, overwrite=overwrite)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.log = Log(self.out_dir / LOG)
        self.watch.log, self.watch.out_dir = self.log, self.out_dir
        found = checkpoint.checkpoints(self.out_dir)
        if resume:
            self._restore(found[-1])
            self.log.cut(self.progress.step)
        else:
            checkpoint.remove(found)
            remove_bests(self.out_dir)
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
        if progress.step > self.steps:
            raise ConfigError(
                f"{path} is after step {progress.step}, and the run is to have {self.steps} steps; "
                "what was done cannot be taken back: ask for more steps, or start a new run"
            )
        self._take(path)
        self.model.attach(self.adapter)
        self.optimizer.parameters = self._trained()
        moments = {name: np.empty_like(a) for name, a in self.optimizer.state().items()}
        checkpoint.restore_moments(path, moments)
        self.optimizer.restore(moments)
        self.progress, self.saved = progress, progress.step

    def _take(self, path: Path) -> None:
        """Brings the arrays that are trained to what a saved adapter of this run has."""
        whole, config = whole_of(self.adapter), self.model.home_config
        rows = None if whole is None else whole.tensors.__getitem__
        stored = type(self.adapter).load(path, config, base=rows)  # type: ignore[attr-defined]
        checkpoint.restore_arrays(str(path), trainable(stored), trainable(self.adapter))

    def save(self) -> None:
        """Writes a checkpoint of the present step, unless that is on disk already."""
        if self.out_dir is not None and self.saved != self.progress.step:
            self.ranks.first(self._write)
            self.saved, self.saved_at = self.progress.step, time.monotonic()

    def _write(self) -> None:
        assert self.out_dir is not None
        self.model.collect()
        state, keep = self.optimizer.state(), self.config.keep
        checkpoint.write(self.out_dir, self.adapter, state, self.progress, self.identity, keep)
        self.watch.tidy()

    def _trained(self) -> dict[str, Any]:
        """The arrays that are trained, where the backend computes."""
        beside = {**self.model.whole_arrays, **self.objective.parameters(self.model)}
        return {**trainable(self.model.placed), **beside}

    def prepare(self, examples: Sequence[Any]) -> None:
        """What the objective computes once."""
        self.objective.prepare(self.model, examples, self.out_dir)
        self.optimizer.parameters = self._trained()  # the adapter was away meanwhile

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
            for step in self._remaining():
                info = self._step(step)
                last = p.step == self.steps
                self._record(info)
                if watch.due(p.step, last):
                    evaluation = look()
                    self.model.collect()
                    watch.judge(evaluation, p, self.adapter)
                    info = replace(info, evaluation=evaluation)
                self._between(info, on_step, interrupts)
                if last or watch.exhausted(p) or self._due():
                    self.save()
        return self._end(evaluation)

    def _due(self) -> bool:
        """Whether a checkpoint is, by steps or by time; the clock is rank 0's."""
        every, minutes = self.config.save_every, self.config.save_minutes
        if every is not None and self.progress.step % every == 0:
            return True
        if minutes is None:
            return False
        return self.ranks.first(lambda: time.monotonic() - self.saved_at >= 60 * minutes)

    def _end(self, evaluation: Evaluation | None) -> TrainResult:
        """Writes the result: the last adapter, or the best one, which the model then has."""
        p = self.progress
        self.model.collect()
        best = self.ranks.first(self._take_best)
        if best:
            self.ranks.copy(trainable(self.adapter).values())
            self.model.attach(self.adapter)
            evaluation = dict(self.watch.seen).get(p.best_step)
        if evaluation is None and self.watch.examples:  # a finished run was resumed
            evaluation = self.watch.now()
        if self.out_dir is not None:
            self.ranks.first(self._write_result)
        return TrainResult(
            losses=list(p.losses),
            steps=p.step,
            tokens=p.tokens,
            seconds=p.seconds,
            tokens_per_second=p.tokens / p.seconds if p.seconds > 0 else 0.0,
            adapter=self.adapter,
            evaluation=evaluation,
            evaluations=self.watch.seen,
            best_step=p.best_step if best else None,
            stopped_early=p.step < self.steps,
            identity=self.identity,
        )

    def _take_best(self) -> bool:
        """Whether the best adapter is another than the last one, whose place it then takes."""
        best = self.watch.best_folder(self.progress)
        if best is not None:
            self._take(best)
        return best is not None

    def _write_result(self) -> None:
        assert self.out_dir is not None
        self.adapter.save(self.out_dir / ADAPTER)  # type: ignore[attr-defined]
        for step in bests(self.out_dir)[:-1]:
            shutil.rmtree(self.out_dir / f"best-{step:06d}")

    def _between(
        self, info: StepInfo, on_step: Callable[[StepInfo], None] | None, interrupts: Interrupts
    ) -> None:
        """Shows a step, and ends the run if a process was asked to: on every rank then."""
        stop: KeyboardInterrupt | SystemExit | None = None
        try:
            if on_step is not None:
                on_step(info)
            interrupts.check()
        except (KeyboardInterrupt, SystemExit) as asked:
            stop = asked
        asked_of = [i for i, one in enumerate(self.ranks.gather(stop is not None)) if one]
        if asked_of:
            self.save()
            raise stop or KeyboardInterrupt(f"rank {asked_of[0]} was interrupted")

    def _remaining(self) -> Iterator[Step]:
        """The steps still to do; progress is moved on after each."""
        p = self.progress
        while p.step < self.steps and not self.watch.exhausted(p):
            epoch = epoch_of(self.config, [len(e) for e in self.examples], p.epoch)
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
        drop = DropKey(c.seed, number, noise=c.neftune_noise_alpha)
        ranks = self._rank_dropout(number)
        with ranks.applied():
            loss, rows, grads = self.objective.gradients(
                self.model, self.examples, step, drop, c.recompute
            )
        named = gradients(grads, self.optimizer.parameters)
        ranks.through(named)
        self.held.clear(named)
        norm = self.optimizer.norm(named)
        rate = learning_rate(
            number,
            self.steps,
            peak=c.learning_rate,
            schedule=c.schedule,
            warmup_steps=c.warmup_steps,
            floor=c.floor * c.learning_rate,
            decay_steps=c.decay_steps,
            cycles=c.cycles,
        )
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(self._diverged(number, loss, norm, rate))
        self.optimizer.update(named, norm, number, rate)
        self.held.restore(self.optimizer.parameters)
        self.model.renew()
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

    def _rank_dropout(self, step: int) -> RankDropout:
        c, held = self.config, getattr(self.adapter, "held", {})
        xp, arrays = self.model.ops.xp, self.optimizer.parameters
        return RankDropout(c.rank_dropout, arrays, held, seed=c.seed, step=step, xp=xp)

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
            self.log.add(step_line(info, self.model.precision_report))
