"""`pylora train --find-lr`: tries rates, draws what they do to the loss, and says which to take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pylora.commands.guard import sentence
from pylora.display.console import Console
from pylora.errors import ConfigError, MissingExtraError
from pylora.files.whole import atomic_write
from pylora.training.launched import launched

LOG, PICTURE = "find-lr.jsonl", "find-lr.png"


def check_alone() -> None:
    """ConfigError where several processes were started."""
    if launched() > 1:
        raise ConfigError("--find-lr is one process's work; start it without mpiexec")


def find_rate(
    screen: Console,
    parts: tuple[Any, Any, Any, Any],
    settings: Any,
    steps: int | None,
    out: Path,
) -> None:
    """`parts`: model, adapter, examples, objective. Writes OUT/find-lr.jsonl and a picture."""
    from pylora.display.rates import rate_picture
    from pylora.training import findrate

    model, adapter, examples, objective = parts
    count = findrate.STEPS if steps is None else steps
    screen.say(
        f"trying rates from {findrate.LOW:g} to {findrate.HIGH:g} in {count} steps; the adapter is "
        "not kept"
    )
    every = max(1, count // 10)

    def on_step(step: int, rate: float, loss: float) -> None:
        if step % every == 0:
            screen.say(f"  rate {rate:.2g}: loss {loss:.4f}")

    found = findrate.find_rate(
        model, adapter, examples, settings, objective, steps=count, on_step=on_step
    )
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / LOG) as beside:
        lines = [
            {"step": i + 1, "learning_rate": rate, "loss": loss, "relative": relative}
            for i, (rate, loss, relative) in enumerate(
                zip(found.rates, found.losses, found.relative, strict=True)
            )
        ]
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    try:
        rate_picture(out / PICTURE, found, chosen=settings.learning_rate)
        screen.say(f"picture: {out / PICTURE}")
    except (MissingExtraError, OSError) as error:  # the numbers are there all the same
        said = sentence(error) if isinstance(error, OSError) else error
        screen.say(f"no picture: {said}")
    if not found.rates or math.isnan(found.least):
        raise ConfigError("the loss is not a number at the lowest rate: look at the base and data")
    if found.suggested is None:
        screen.say("the loss fell at no rate: more --steps, or other data")
        return
    screen.say(
        f"suggested: --lr {found.suggested:g} (the loss was least at {found.least:.2g}; by the "
        f"model's width it would be {settings.learning_rate:g})"
    )
