"""The requests of one body on their way through the engine, and what comes of them, in order.

Events come on the engine's thread and are handed to the event loop; nothing else is done there.
Whoever stops listening cancels what has not ended, so that no token is computed for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from pylora.serving.engine import Engine, Ticket
from pylora.serving.request import (
    Closed,
    Done,
    Event,
    Failed,
    QueueFull,
    Request,
    UnknownAdapter,
)
from pylora.web.problem import Problem, busy, closing

Heard = tuple[int, Event]


class Flight:
    """`submit` in any thread; then `events` on the loop; `close` always."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop
        self._heard: deque[Heard] = deque()  # appended to on the engine's thread
        self._asleep: asyncio.Future[bool] | None = None  # whoever waits for more
        self._tickets: list[Ticket] = []
        self._open: set[int] = set()
        self._closed = False

    def submit(self, requests: Sequence[Request]) -> None:
        """All of them, or none. Problem: no room (429), an engine that closes (503)."""
        try:
            for i, request in enumerate(requests):
                self._tickets.append(self._engine.submit(request, partial(self._hear, i)))
                self._open.add(i)
            if self._closed:  # whoever asked has gone meanwhile
                self.close()
        except QueueFull as error:
            self.close()
            raise busy(str(error), error.retry_after) from None
        except UnknownAdapter as error:  # it was unloaded just now
            self.close()
            raise Problem(404, str(error), param="model", code="model_not_found") from None
        except Closed:
            self.close()
            raise closing() from None
        except BaseException:
            self.close()
            raise

    def _hear(self, i: int, event: Event) -> None:
        self._heard.append((i, event))
        if self._asleep is not None:
            with suppress(RuntimeError):  # the loop has ended before the engine
                self._loop.call_soon_threadsafe(self._wake, True)

    def _wake(self, heard: bool) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(heard)

    async def events(self, patience: float | None = None) -> AsyncIterator[Heard | None]:
        """(number of the request, event), until all have ended. With `patience`, None whenever
        nothing was heard for so many seconds. Others have their turn between any two batches."""
        while self._open:
            await asyncio.sleep(0)
            for _ in range(len(self._heard)):
                found = self._heard.popleft()
                if isinstance(found[1], (Done, Failed)):
                    self._open.discard(found[0])
                yield found
            if self._open and not await self._more(patience):
                yield None

    async def _more(self, patience: float | None) -> bool:
        """Waits until something is heard; False if nothing was for so long."""
        self._asleep = self._loop.create_future()  # from here on `_hear` wakes it
        late = None if patience is None else self._loop.call_later(patience, self._wake, False)
        try:
            return True if self._heard else await self._asleep
        finally:
            self._asleep = None
            if late is not None:
                late.cancel()

    def cancel(self, i: int) -> None:
        """Ends one; its Done still comes."""
        if i in self._open:
            self._tickets[i].cancel()

    def close(self) -> None:
        """Cancels all that have not ended. What they still say is not heard."""
        self._closed = True
        for i in tuple(self._open):
            self.cancel(i)
        self._open.clear()


def ended_badly(event: Event) -> Problem | None:
    """What a client is told of an end that is none of its own: None where all is well."""
    if isinstance(event, Failed):
        if isinstance(event.error, Problem):
            return event.error
        if isinstance(event.error, Closed):
            return closing()
        return Problem(500, str(event.error), code="generation_failed", kind="server_error")
    if isinstance(event, Done) and event.reason == "cancelled":
        return closing()
    return None
