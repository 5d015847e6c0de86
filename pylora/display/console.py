"""What the verbs and the demo print: lines, headings, tables and the progress of training.

Nothing here computes or decides, and nothing but Python is needed. On a terminal the progress is a
line that is written over; elsewhere (a log file, CI, TERM=dumb) it is a line now and then. Colour
is for headings alone, and left out where NO_COLOR is set. A stream that cannot show a character is
given its nearest ASCII.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from pylora.display import table as tables
from pylora.display.waiting import EVERY

if TYPE_CHECKING:
    from pylora.training.evaluate import Evaluation
    from pylora.training.info import StepInfo

_ASCII = str.maketrans(
    {
        "×": "x",
        "✓": "+",
        "✗": "x",
        "…": "...",
        "→": "->",
        "≤": "<=",
        "≥": ">=",
        "─": "-",
        "█": "#",
        "░": ".",
        "–": "-",
    }
    | dict(zip("▁▂▃▄▅▆▇", "_.,-=+*", strict=True))
)
_BAR = 24  # cells
_PAUSE = 0.1  # seconds between two states of the live line


class Console:
    """A stream, by default standard output, with the few things that pylora shows."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self.live = self._is_terminal() and os.environ.get(
            "TERM", "dumb" if _posix() else ""
        ) not in (
            "dumb",
            "unknown",
        )
        self.colour = self.live and not os.environ.get("NO_COLOR")

    @property
    def stream(self) -> TextIO | None:
        """Where it goes: looked up each time, as standard output may be exchanged. None: nowhere,
        for a process that was started with its standard output closed."""
        return sys.stdout if self._stream is None else self._stream

    def _is_terminal(self) -> bool:
        try:
            return self.stream is not None and self.stream.isatty()
        except ValueError:  # closed
            return False

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where lines may have any length."""
        return shutil.get_terminal_size().columns if self._is_terminal() else None

    def _write(self, text: str) -> None:
        if self.stream is None:
            return
        try:
            text.encode(self.stream.encoding or "utf-8")
        except (UnicodeEncodeError, LookupError):
            text = text.translate(_ASCII)
        self.stream.write(text)

    def say(self, text: str = "") -> None:
        """One line, as it is."""
        self._write(text + "\n")
        if self.stream is not None:
            self.stream.flush()

    def heading(self, text: str) -> None:
        """A line that opens a part."""
        self.say()
        self.say(f"\x1b[1;36m{text}\x1b[0m" if self.colour else text)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        title: str | None = None,
        right: Sequence[str] = (),
    ) -> None:
        """A table; the columns named in `right` are aligned to the right."""
        if title is not None:
            self.say(title)
        for line in tables.lines(columns, rows, right=right, width=self.width):
            self._write(line + "\n")
        self.say()

    @contextmanager
    def training(self) -> Iterator[Progress]:
        """Shows step, loss, tokens/s and ETA while the block runs; yields train's on_step, whose
        `evaluated` is train's on_evaluation."""
        progress: Progress = _LiveLine(self) if self.live else _NowAndThen(self)
        try:
            yield progress
        finally:
            progress.end()


class Progress(Protocol):
    """What a run shows itself by."""

    def __call__(self, info: StepInfo) -> None:
        """After each step."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """After each evaluation, with the number of steps done."""

    def end(self) -> None:
        """When nothing more comes."""


class _Evaluations:
    """A line for each evaluation, beside what the first one found."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.first: Evaluation | None = None

    def show(self, step: int, evaluation: Evaluation) -> None:
        """The line, and answers to look at below it."""
        when = f"after {step} steps" if step else "before training"
        figures = {"loss": evaluation.nll, **evaluation.metrics}
        before = {} if self.first is None else {"loss": self.first.nll, **self.first.metrics}
        said = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}"
            + (f" (was {before[name]:.4g})" if name in before else "")
            for name, value in figures.items()
        )
        self.console.say(f"evaluation {when}: {said}")
        for sample in evaluation.samples:
            self.console.say(f"  {_cut(sample['prompt'], 48)} → {_cut(sample['answer'], 96)}")
        self.first = self.first or evaluation


def _cut(text: str, most: int) -> str:
    """A text on one line, its end if it is a prompt's, short enough for a line."""
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


class _NowAndThen:
    """train's on_step: a line of a log now and then."""

    def __init__(self, console: Console) -> None:
        self.console, self.evaluations = console, _Evaluations(console)
        self.began, self.before, self.spoke = time.monotonic(), -1, -math.inf

    def __call__(self, info: StepInfo) -> None:
        step, steps = info.step, info.steps
        # A resumed run begins in the middle.
        self.before = step - 1 if self.before < 0 else self.before
        tenth, now = max(1, steps // 10), time.monotonic()
        asked = step % tenth == 0 or step in (self.before + 1, steps)
        if asked or now - self.spoke >= EVERY:
            self.spoke = now
            figures = _figures(info, self.began, self.before)
            self.console.say(f"step {step}/{steps}  {figures}  {now - self.began:.0f} s")

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """A line of its own."""
        self.evaluations.show(step, evaluation)

    def end(self) -> None:
        """Nothing is open."""


class _LiveLine:
    """train's on_step: one line of a terminal that is written over, a few times a second."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.before, self.written, self.length = -1, 0.0, 0
        self.evaluations = _Evaluations(console)

    def __call__(self, info: StepInfo) -> None:
        if self.before < 0:
            self.before = info.step - 1
        now = time.monotonic()
        if now - self.written < _PAUSE and info.step < info.steps:
            return
        self.written = now
        step, figures = f"step {info.step}/{info.steps}", _figures(info, self.began, self.before)
        width = (self.console.width or 80) - 1
        bar = max(0, min(_BAR, width - len(step) - len(figures) - 2))
        done = round(bar * info.step / max(1, info.steps))
        text = f"{step} {'█' * done}{'░' * (bar - done)} {figures}"[: max(10, width)]
        self.console._write("\r" + text.ljust(self.length))
        self.length = len(text)
        if self.console.stream is not None:
            self.console.stream.flush()

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """A line of its own, in place of the one that is written over, which comes again below."""
        self.console._write("\r" + " " * self.length + "\r")
        self.length, self.written = 0, 0.0
        self.evaluations.show(step, evaluation)

    def end(self) -> None:
        """Leaves the line as it is, and what comes goes below it."""
        if self.length:
            self.console.say()


def _figures(info: StepInfo, began: float, before: int) -> str:
    left = (time.monotonic() - began) / (info.step - before) * (info.steps - info.step)
    rate = info.tokens_seen / max(info.seconds, 1e-9)
    return f"loss {info.loss:.4f}  {rate:.0f} tokens/s  ETA {left:.0f} s"


def _posix() -> bool:
    return os.name == "posix"


def megabytes(size: float) -> str:
    """Bytes as "1.8 MB"."""
    return f"{size / 1e6:,.1f} MB"
