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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from pylora.display import table as tables
from pylora.display.waiting import EVERY

if TYPE_CHECKING:
    from pylora.training.train import StepInfo

    OnStep = Callable[[StepInfo], None]

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
    def training(self) -> Iterator[OnStep]:
        """Shows step, loss, tokens/s and ETA while the block runs; yields train's on_step."""
        if not self.live:
            yield self._now_and_then()
            return
        bar = _LiveLine(self)
        try:
            yield bar
        finally:
            bar.end()

    def _now_and_then(self) -> OnStep:
        began, before, spoke = time.monotonic(), -1, -math.inf

        def on_step(info: StepInfo) -> None:
            nonlocal before, spoke
            step, steps = info.step, info.steps
            before = step - 1 if before < 0 else before  # a resumed run begins in the middle
            tenth, now = max(1, steps // 10), time.monotonic()
            if step % tenth == 0 or step in (before + 1, steps) or now - spoke >= EVERY:
                spoke = now
                self.say(
                    f"step {step}/{steps}  {_figures(info, began, before)}  {now - began:.0f} s"
                )

        return on_step


class _LiveLine:
    """train's on_step: one line of a terminal that is written over, a few times a second."""

    def __init__(self, console: Console) -> None:
        self.console, self.began = console, time.monotonic()
        self.before, self.written, self.length = -1, 0.0, 0

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
