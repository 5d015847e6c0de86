"""A bell between the engine's thread and the event loop: one ring for all who heard something.

A step says a token to each of its requests. Waking the loop costs a system call, so it is woken
once, and answers for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress


class Bell:
    """Of one event loop. `ring` is for any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._ringing = False

    def ring(self, call: Callable[[], None]) -> None:
        """`call()` on the loop, soon. Nothing happens once the loop has ended."""
        self._calls.append(call)
        if not self._ringing:
            self._ringing = True
            with suppress(RuntimeError):  # the loop has ended before the engine
                self.loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._ringing = False  # before the calls are taken: one that comes behind them rings again
        while self._calls:
            self._calls.popleft()()
