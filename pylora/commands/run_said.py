"""What `pylora train` says when a run ends: by itself, or because a signal came."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.commands.guard import sentence
from pylora.commands.together import again
from pylora.display.console import Console

if TYPE_CHECKING:
    from pylora.training.config import TrainConfig
    from pylora.training.info import TrainResult


@contextmanager
def saying_where(out: Path, args: Any) -> Iterator[list[tuple[int, int]]]:
    """Yields a list for (step, steps). If the block is interrupted, the sentence about it says how
    far it came, what is on disk, and with which command it goes on."""
    from pylora.training.checkpoint import checkpoints

    seen: list[tuple[int, int]] = []
    try:
        yield seen
    except KeyboardInterrupt as error:
        came = f" after step {seen[-1][0]} of {seen[-1][1]}" if seen else " before a step was done"
        saved = checkpoints(out)
        if saved:
            step = int(saved[-1].name.rpartition("-")[2])
            what = f"saved in {saved[-1]}"
            if seen and step < seen[-1][0]:
                what = f"the newest checkpoint is of step {step}: {saved[-1]}"
            what += f"; to go on: {_again(args, out)}"
        else:
            what = "no checkpoint was written"
        error.args = (f"{error or 'interrupted'}{came}; {what}",)
        raise


def _again(args: Any, out: Path) -> str:
    """The command line that continues the run: its folder has the settings."""
    args = list(args or ())
    backend = [
        a for i, a in enumerate(args) if a.startswith("--backend") or args[i - 1] == "--backend"
    ]
    return shlex.join(again(["pylora", *backend, "train", "--resume", str(out)]))


def after_training(screen: Console, result: TrainResult, out: Path) -> None:
    from pylora.display.plots import loss_curve, sparkline
    from pylora.errors import MissingExtraError
    from pylora.training.log import evaluations

    screen.say(
        f"loss {result.losses[0]:.4f} {sparkline(result.losses)} {result.losses[-1]:.4f}; "
        f"{result.tokens_per_second:.0f} tokens/s"
    )
    if result.evaluation is not None:
        e = result.evaluation
        first = result.evaluations[0] if result.evaluations else (1, e)
        was = f" (was {first[1].nll:.4f} before training)" if first[0] == 0 else ""
        screen.say(", ".join([f"evaluation: loss {e.nll:.4f}{was}", *e.others()]))
    if result.stopped_early:
        screen.say(f"ended after step {result.steps}: the evaluation got no better")
    if result.best_step is not None:
        screen.say(f"the adapter is that of step {result.best_step}, the best by evaluation")
    try:
        seen = evaluations(out / "log.jsonl")
        loss_curve(out / "loss.png", result.losses, evaluations=seen)
    except (MissingExtraError, OSError) as error:  # the adapter is there all the same
        said = sentence(error) if isinstance(error, OSError) else error
        screen.say(f"no picture of the loss: {said}")
    screen.say(f"adapter: {out / 'adapter'}")


def how_long(config: TrainConfig, steps: int) -> str:
    """What the run is going to be, where some of it was chosen."""
    rate = f"rate {config.learning_rate:g}, {config.schedule}"
    if config.steps is not None or config.epochs is None:
        return f"{steps:,} steps; {rate}"
    passes = "1 epoch" if config.epochs == 1 else f"{config.epochs} epochs"
    return f"{steps:,} steps, {passes}; {rate}"


def write_model_card(
    out: Path, base: str, data: str, examples: Any, settings: str, result: TrainResult
) -> None:
    """README.md in the run's folder and the adapter's; `settings` is the text of run.json."""
    from pylora.training.card import Source, card, write
    from pylora.training.log import evaluation_records

    source = Source(
        base=base,
        base_digest=result.identity["base model"],
        data=data,
        data_digest=result.identity["training data"],
        records=len(examples),
        tokens=sum(map(len, examples)),
        notes=examples.notes,
        settings=json.loads(settings),
    )
    write(out, card(source, result, evaluation_records(out / "log.jsonl")))
