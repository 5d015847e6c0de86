"""The requests of one body on their way through the engine, and what comes of them, in order.

Events come on the engine's thread and are handed to the event loop; nothing else is done there.
Waking the loop costs more than what a token needs there, so tokens that come very fast are given
out together, and those of an answer that is sent as a whole a few times a second.
Whoever stops listening cancels what has not ended, so that no token is computed for nobody.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from pylora.serving.engine import Engine, Ticket
from pylora.serving.request import (
    Closed,
    Done,
    Event,
    Failed,
    QueueFull,
    Request,
    Token,
    UnknownAdapter,
)
from pylora.web.bell import Bell
from pylora.web.problem import Problem, busy, closing

Heard = tuple[int, Event]
REST = 1 / 250  # seconds that lie between two wakings at least, where tokens are seen as they come
ASLEEP = 1 / 10  # where they are seen at the end


class Flight:
    """`submit` in any thread; then `events` on the loop; `close` always."""

    def __init__(self, engine: Engine, bell: Bell) -> None:
        self._engine, self._bell, self._loop = engine, bell, bell.loop
        self._heard: deque[Heard] = deque()  # appended to on the engine's thread
        self._asleep: asyncio.Future[bool] | None = None  # whoever waits for more
        self._resting = False  # whether more tokens may wait for those behind them
        self._urgent = False  # an end was heard: that waits for nothing
        self._due = 0.0  # when the next tokens are given out
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
        last = isinstance(event, (Done, Failed))
        self._urgent = self._urgent or last
        if self._asleep is not None and (last or not self._resting):
            self._bell.ring(self._wake)

    def _wake(self, heard: bool = True) -> None:
        if self._asleep is not None and not self._asleep.done():
            self._asleep.set_result(heard)

    async def events(
        self, patience: float | None = None, rest: float = REST
    ) -> AsyncIterator[list[Heard] | None]:
        """(number of the request, event), in order, as many as have come, until all have ended.
        With `patience`, None whenever nothing was heard for so many seconds. The first token and
        the ends are given out at once, what is between every `rest` seconds at most. Others have
        their turn between."""
        while self._open:
            if not await self._more(patience):
                yield None
                continue
            self._urgent = False
            found = [self._heard.popleft() for _ in range(len(self._heard))]
            for i, event in found:
                if isinstance(event, (Done, Failed)):
                    self._open.discard(i)
                elif isinstance(event, Token):
                    self._due = self._loop.time() + rest
            if found:
                yield found

    async def _more(self, patience: float | None) -> bool:
        """Waits until something is heard; False if nothing was for so long."""
        if self._urgent or self._due <= self._loop.time():
            if self._heard:
                await asyncio.sleep(0)
                return True
        else:
            self._resting = True
            await self._sleep(self._due)
            self._resting = False
            if self._heard:
                return True
        return await self._sleep(None if patience is None else self._loop.time() + patience)

    async def _sleep(self, until: float | None) -> bool:
        """Waits until woken; False if it was by the clock."""
        self._asleep = self._loop.create_future()  # from here on `_hear` wakes it
        late = None if until is None else self._loop.call_at(until, self._wake, False)
        try:
            if self._urgent or (self._heard and not self._resting):
                return True
            return await self._asleep
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
