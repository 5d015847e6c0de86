"""The log of a run, one JSON object per line; and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from pylora.files.whole import atomic_write
from pylora.training.info import StepInfo
from pylora.training.memory import peak_rss_bytes


class Log:
    """log.jsonl. Each line is flushed, so that the log can be watched."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: dict[str, Any]) -> None:
        """Appends a line. Numbers are written so that reading gives the same bits."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            error.filename = error.filename or str(self.path)  # a full disk does not say of what
            raise

    def cut(self, last: int) -> None:
        """Drops what was logged after step `last`, and a line that was only half written."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= last:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                continue
        with atomic_write(self.path) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def step_line(info: StepInfo, precision: str) -> dict[str, Any]:
    """What is logged of a step."""
    return {
        "step": info.step,
        "epoch": info.epoch,
        "loss": info.loss,
        "learning_rate": info.learning_rate,
        "grad_norm": info.grad_norm,
        "tokens": info.tokens_seen,
        "tokens_per_second": info.tokens_per_second,
        "seconds": info.seconds,
        "eta_seconds": info.seconds / info.step * (info.steps - info.step),
        "memory_bytes": peak_rss_bytes(),
        "precision": precision,
    }


def evaluations(path: Path) -> list[tuple[int, float]]:
    """(step, loss) of each evaluation in a run's log.jsonl, in order; none where there is no log.

    A line that was only half written is passed over.
    """
    found: list[tuple[int, float]] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            found.append((int(record["step"]), float(record["eval_loss"])))
        except (ValueError, TypeError, KeyError):
            continue
    return found


def evaluation_records(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, the figures "eval_…") of each evaluation in a run's log.jsonl, in order."""
    found = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
            figures = {name: v for name, v in record.items() if name.startswith("eval_")}
            if figures:
                found.append((int(record["step"]), figures))
        except (ValueError, TypeError, KeyError, AttributeError):  # half written
            continue
    return found


class Interrupts:
    """While active, the first signal that would end the run (SIGINT's KeyboardInterrupt, what a
    program has SIGTERM and SIGHUP do, or the end of the process that they are by default) is only
    noted, for `check` to raise between two steps; the second one is raised at once. Signals that
    are ignored are left alone, and so are all of them in a thread other than the main one."""

    def __enter__(self) -> Interrupts:
        self._noted = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is None:
                    continue
                before = signal.getsignal(number)
                if callable(before) or before == signal.SIG_DFL:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self._do(number, frame)
        self._noted = number

    def _do(self, number: int, frame: FrameType | None = None) -> None:
        """What the signal would have done: raises KeyboardInterrupt, as a rule, or SystemExit with
        the code that a shell reports for a process that the signal ended."""
        before = self._before[number]
        if not callable(before):
            raise SystemExit(128 + number)
        before(number, frame)

    def check(self) -> None:
        """Does what the signal that has come would have done."""
        if self._noted:
            number, self._noted = self._noted, 0
            self._do(number)

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
