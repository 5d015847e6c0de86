"""An endpoint that generates: a body becomes requests, their events become an answer or a stream.

The same for chat, completions and llama.cpp's completion; what differs is how the body is read
(`ask`) and how the answer is written (`shapes`).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Send

from pylora.serving.request import Done, Echo, Token
from pylora.web import log, wire
from pylora.web.ask import Asked
from pylora.web.choice import Choice, Piece
from pylora.web.fields import Record
from pylora.web.flight import ASLEEP, REST, Flight, Heard, ended_badly
from pylora.web.house import House
from pylora.web.keys import Key
from pylora.web.landing import landing
from pylora.web.metrics import label
from pylora.web.problem import Problem
from pylora.web.shapes import Completion, Shape

Event = dict[str, Any]
_IDLE = 15.0  # seconds without a token, after which a comment keeps the connection open


@dataclass(frozen=True)
class Way:
    """An endpoint: which body it takes, how that is read, how its answer is written."""

    path: str
    body: Record
    ask: Callable[[House, Key, Mapping[str, Any]], Asked]
    shape: Callable[[Asked, str], Shape]


class Course:
    """One body on its way. Made for each request."""

    def __init__(self, house: House, way: Way, who: Key, note: log.Note) -> None:
        self.house, self.way, self.who, self.note = house, way, who, note
        self.flight = Flight(house.engine, house.bell())
        self.began = time.monotonic()
        self.asked: Asked
        self.choices: list[Choice] = []
        self.prompt_tokens = self.cached = 0

    def prepare(self, data: bytes) -> None:
        """Reads the body and submits its requests. In a thread."""
        body = self.way.body(wire.parsed(data))
        self.asked = asked = self.way.ask(self.house, self.who, body)
        self.shape = self.way.shape(asked, self.house.fingerprint)
        self.choices = [
            Choice(i, asked.tokenizer, request.ids, asked.stop, asked.style)
            for i, request in enumerate(asked.requests)
        ]
        self.prompt_tokens = sum(len(prompt.ids) for prompt in asked.prompts)
        self.note.adapter, self.note.prompt = label(asked.adapters), self.prompt_tokens
        self.flight.submit(asked.requests)

    def pieces(self, heard: Iterable[Heard]) -> Iterator[tuple[Choice, Piece, bool]]:
        """(an answer, what became certain of it, whether that is its end) by what was heard."""
        for i, event in heard:
            choice = self.choices[i]
            if isinstance(event, Token):
                ended = choice.ended
                piece = choice.take(event, self.asked.logs)
                if choice.ended and not ended:
                    self.flight.cancel(choice.number)
                yield choice, piece, False
                continue
            if isinstance(event, Echo) and isinstance(self.shape, Completion):
                self.shape.echoes[choice.number] = event.tokens
            if isinstance(event, Done):
                self._count(event, choice)
            problem = None if choice.ended else ended_badly(event)
            if problem is not None:
                raise problem
            if isinstance(event, Done):
                yield choice, choice.finish(event.reason), True

    def _count(self, event: Done, choice: Choice) -> None:
        self.cached += event.usage.cached_tokens if choice.number % self.asked.n == 0 else 0
        reason = "stop" if choice.ended else event.reason
        self.house.metrics.answer(label(self.asked.adapters), reason, event.usage)
        self.note.queued = max(self.note.queued, event.usage.queued_s)
        self.note.first = max(self.note.first, event.usage.first_s)

    def usage(self) -> dict[str, Any]:
        """OpenAI's object."""
        new = sum(choice.tokens for choice in self.choices)
        self.note.completion = new
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one."""
        said = [Piece() for _ in self.choices]
        # A stop string is looked for as tokens come: none behind it should be computed for long.
        rest = REST if self.asked.stop else ASLEEP
        async for heard in self.flight.events(rest=rest):
            for choice, piece, _ in self.pieces(heard or ()):
                all_of = said[choice.number]
                all_of.text += piece.text
                all_of.entries += piece.entries
                all_of.calls += piece.calls
        return self.shape.whole(self.choices, said, self.usage())

    async def events(self) -> AsyncIterator[list[Event] | None]:
        """The answer in pieces, as many as there are at a time."""
        opened: set[int] = set()
        async for heard in self.flight.events(_IDLE):
            if heard is None:
                yield None
                continue
            events: list[Event] = []
            try:
                for choice, piece, last in self.pieces(heard):
                    if choice.number not in opened:
                        opened.add(choice.number)
                        events += self.shape.opening(choice)
                    if last:
                        events += self.shape.closing(choice, piece)
                    elif piece:
                        events += self.shape.piece(choice, piece)
            except Problem:
                if events:  # what came before is said before
                    yield events
                raise
            if events:
                yield events
        used = self.shape.used(self.usage())
        if used is not None:
            yield [used]

    async def send(self, send: Send) -> None:
        """The response. Whoever hangs up cancels this, and with it the requests."""
        headers = {"X-Request-Id": self.note.id}
        way = (self.house, self.way.path, self.flight, self.note)
        async with landing(*way, send, headers, self.began):
            try:
                if self.asked.stream:
                    events = self.events()
                    await wire.send_events(send, events, headers, self._broke)
                else:
                    await wire.send_json(send, wire.Json(await self.whole(), 200, headers))
            finally:
                self.note.completion = sum(choice.tokens for choice in self.choices)

    def _broke(self, problem: Problem) -> None:
        """A stream ended with an error."""
        self.note.status, self.note.error = problem.status, str(problem)


async def answer(
    house: House, way: Way, request: HttpRequest, who: Key, note: log.Note
) -> Response:
    """The endpoint. Problem for what cannot be answered."""
    data = await wire.read_bytes(request, house.limits.body)
    course = Course(house, way, who, note)
    try:
        await house.aside(lambda: course.prepare(data))
    except BaseException:
        course.flight.close()
        raise
    return wire.Watched(course.send)
