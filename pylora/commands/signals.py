"""Ctrl-C, and a polite request to end (SIGTERM, SIGHUP), as an exception that ends a verb cleanly.

While `Signals` is active each of them raises `Stopped`, a KeyboardInterrupt, so that what is half
written is removed and a training run saves its step. Never a traceback: not from an import that
was interrupted, nor from a finalizer. Signals that somebody else handles, or that are ignored
(nohup), are left as they are, and so are all of them outside of the main thread.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

_RECENT = 2.0  # seconds
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "terminated"}


_active: Signals | None = None


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end. Its text is what is said about it."""

    def __init__(self, number: int) -> None:
        super().__init__(_WORDS.get(signal.Signals(number).name, "stopped"))
        self.code = 128 + number  # as a shell reports a process that a signal ended


class Signals:
    """A context. `number` is the last signal that came, 0 if none did."""

    def __init__(self) -> None:
        self.number, self.at = 0, 0.0
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> Signals:
        global _active
        _active = self
        if threading.current_thread() is threading.main_thread():
            for name in _WORDS:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is None:
                    continue
                before = signal.getsignal(number)
                if before in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = before
                    signal.signal(number, self._stop)
            sys.unraisablehook = self._unraisable
        return self

    @property
    def just_now(self) -> bool:
        """Whether a signal came so recently that an error may be its doing."""
        return bool(self.number) and time.monotonic() - self.at < _RECENT

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.number, self.at = number, time.monotonic()
        raise Stopped(number)

    def _unraisable(self, lost: Any) -> None:
        """Python drops what is raised in a finalizer, and prints it: a signal is sent again."""
        if isinstance(lost.exc_value, Stopped):
            again = threading.Timer(0.05, _thread.interrupt_main, (lost.exc_value.code - 128,))
            again.daemon = True
            again.start()
        else:
            self._hook(lost)

    def __exit__(self, *exc: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._hook


def interrupted_import() -> None:
    """Raises what the signal raised, if one came just now: an import that it ended may have come
    out as a package that cannot be imported."""
    if _active is not None and _active.just_now:
        raise SystemExit(_say_stopped(_active.number))


def _say_stopped(number: int) -> int:
    stopped = Stopped(number)
    if sys.stderr is not None:
        print(f"pylora: {stopped}", file=sys.stderr)
    return stopped.code


def silence() -> None:
    """From now on a signal ends the process at once, without a word: there is nothing to save."""
    if threading.current_thread() is threading.main_thread():
        for name in _WORDS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
