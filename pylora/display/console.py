"""What the verbs and the demo print: tables, headings and the progress of training, through rich.

Nothing here computes or decides. Needs the `cli` extra. On a terminal the progress is a live bar;
elsewhere (a log file, CI) it is a line now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pylora.extras import need

if TYPE_CHECKING:
    from pylora.training.train import StepInfo

    OnStep = Callable[[StepInfo], None]


class Console:
    """A rich console with the few things that pylora shows."""

    def __init__(self) -> None:
        console = need("rich.console").Console
        self.rich = console(highlight=False)
        if not self.rich.is_terminal:  # a log has no width; paths in tables should stay whole
            self.rich = console(highlight=False, width=150)

    def say(self, text: str = "") -> None:
        """One line, as it is: brackets in it are text."""
        self.rich.print(text, markup=False, soft_wrap=True)

    def heading(self, text: str) -> None:
        """A line that opens a part."""
        self.rich.print()
        self.rich.print(need("rich.text").Text(text, style="bold cyan"))

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        title: str | None = None,
        right: Sequence[str] = (),
    ) -> None:
        """A table; the columns named in `right` are aligned to the right."""
        table = need("rich.table").Table(title=title, title_justify="left", title_style="bold")
        text = need("rich.text").Text
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left")
        for row in rows:
            table.add_row(*(text(str(cell)) for cell in row))
        self.rich.print(table)

    @contextmanager
    def training(self) -> Iterator[OnStep]:
        """Shows step, loss, tokens/s and ETA while the block runs; yields train's on_step."""
        if not self.rich.is_terminal:
            yield self._lines()
            return
        progress = need("rich.progress")
        bar = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            progress.TextColumn("loss {task.fields[loss]}"),
            progress.TextColumn("{task.fields[rate]} tokens/s"),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(),
            console=self.rich,
        )
        with bar:
            task: Any = bar.add_task("training", total=None, loss="-", rate="-")

            def on_step(info: StepInfo) -> None:
                bar.update(
                    task,
                    total=info.steps,
                    completed=info.step,
                    loss=f"{info.loss:.4f}",
                    rate=f"{info.tokens_seen / max(info.seconds, 1e-9):.0f}",
                )

            yield on_step

    def _lines(self) -> OnStep:
        began, before = time.monotonic(), -1

        def on_step(info: StepInfo) -> None:
            nonlocal before
            step, steps = info.step, info.steps
            before = step - 1 if before < 0 else before  # a resumed run begins in the middle
            if step % max(1, steps // 10) == 0 or step in (before + 1, steps):
                left = (time.monotonic() - began) / (step - before) * (steps - step)
                rate = info.tokens_seen / max(info.seconds, 1e-9)
                self.say(
                    f"step {step}/{steps}  loss {info.loss:.4f}  {rate:.0f} tokens/s  "
                    f"ETA {left:.0f} s"
                )

        return on_step


def megabytes(size: float) -> str:
    """Bytes as "1.8 MB"."""
    return f"{size / 1e6:,.1f} MB"
