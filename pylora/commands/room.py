"""What `pylora train` and `pylora plan` say of the memory a run needs, and what --fit changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.commands.app import RUN
from pylora.commands.guard import warn
from pylora.display.console import Console
from pylora.errors import ConfigError, DataError
from pylora.training.launched import launched

if TYPE_CHECKING:
    from pylora.training.config import TrainConfig
    from pylora.training.estimate import Fit

Fits = Annotated[
    bool,
    typer.Option(
        "--fit/--no-fit",
        rich_help_panel=RUN,
        help="where memory is short: --recompute, then more --accumulation, then, unless it was "
        "given, a narrower --precision",
    ),
]
_SPARE = 0.95  # of what is free: what is left for the rest of the machine


@dataclass(frozen=True)
class Wanted:
    """A run whose memory is asked for; nothing of it has been loaded."""

    checkpoint: Any
    plan: Any
    precision: str | None  # as it was typed
    settings: TrainConfig
    lengths: Sequence[int]
    whole: int = 0  # numbers that are trained beside A and B

    def ways(self, backend: Any) -> tuple[list[Fit], float]:
        """`pylora.training.estimate.ways`, and the bytes that the process may hold in all."""
        from pylora.numbers.precision import AUTO, fastest
        from pylora.training.estimate import ways
        from pylora.training.memory import free_bytes, held_bytes

        packed = getattr(self.checkpoint, "packed_as", None)
        precision = self.precision
        if precision is None or (precision == AUTO and packed):
            precision = packed or "fp32"
        elif precision == AUTO:
            precision = fastest(backend.name, getattr(backend, "isa", None))
        held = held_bytes() or 0
        narrower = ("bf16", "int8", "int4") if self.precision in (None, AUTO) else ()
        tried = ways(
            self.checkpoint, self.plan, precision, self.settings, self.lengths, held,
            narrower, whole=self.whole,
        )  # fmt: skip
        return tried, held + _SPARE * free_bytes() / launched()


def in_room(screen: Console, wanted: Wanted, fit: bool) -> tuple[TrainConfig, str | None, bool]:
    """Settings and precision for the run, and whether they are others than were asked for. Says
    what the run needs; ConfigError where --fit finds nothing that there is room for."""
    from pylora import backends
    from pylora.training.estimate import fitting

    backend = backends.get()
    if backend.name != "c":
        if fit:
            raise ConfigError(f"--fit knows the memory of the c backend, not of {backend.name}")
        return wanted.settings, wanted.precision, False
    try:
        tried, room = wanted.ways(backend)
    except DataError:  # too long for --max-tokens: the run says of which record
        return wanted.settings, wanted.precision, False
    first = tried[0]
    screen.say(f"memory: about {first.estimate.words()}")
    if first.estimate.total <= room:
        return wanted.settings, wanted.precision, False
    if not fit:
        screen.say(f"note: {short(tried, room)}")
        return wanted.settings, wanted.precision, False
    found = fitting(tried, room)
    if found is None:
        raise ConfigError(short(tried, room))
    screen.say(f"--fit: {', '.join(found.changed)}: about {found.estimate.words()}")
    narrowed = found.precision != first.precision
    return found.config, found.precision if narrowed else wanted.precision, True


def beyond_its_positions(checkpoint: Any, items: Sequence[Any]) -> None:
    """Gives the open checkpoint room for the longest of the records, with a warning where the model
    was not made for it; one that can have no room stays, and its records are refused later."""
    from pylora.training.longer import stretched

    before, longest = checkpoint.config, max(map(len, items), default=0)
    checkpoint.config = stretched(before, longest)
    if checkpoint.config is not before:
        warn(
            f"a record has {longest:,} tokens, and the model was made for "
            f"{before.max_positions:,}: the rotation goes on by its rule, over positions that the "
            "model has never seen"
        )


def short(tried: Sequence[Fit], room: float) -> str:
    """A sentence about a run that there is no room for, with what would make room."""
    from pylora.training.estimate import fitting, gigabytes

    first, found = tried[0], fitting(tried, room)
    needed = gigabytes(first.estimate.total)
    text = f"there is room for {gigabytes(room)} in all, and the run needs {needed}"
    if found is not None:
        how = " ".join(found.changed)
        return f"{text}; with {how} it needs {gigabytes(found.estimate.total)} (--fit does that)"
    last = min(tried, key=lambda one: one.estimate.total)
    how = f" with {' '.join(last.changed)}" if last.changed else ""
    return (
        f"{text}; the least is {gigabytes(last.estimate.total)}{how}: shorter records "
        "(--max-length), a lower --rank, fewer --targets, or a smaller model"
    )
