"""An endpoint that generates: a body becomes requests, their events become an answer or a stream.

The same for chat, completions and llama.cpp's completion; what differs is how the body is read
(`ask`) and how the answer is written (`shapes`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
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
from pylora.web.flight import Flight, ended_badly
from pylora.web.house import House
from pylora.web.keys import Key
from pylora.web.landing import landing
from pylora.web.metrics import label
from pylora.web.problem import Problem
from pylora.web.shapes import Completion, Shape

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
        self.flight = Flight(house.engine, asyncio.get_running_loop())
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

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece, bool] | None]:
        """(an answer, what became certain of it, whether that is its end); None: still waiting."""
        async for heard in self.flight.events(_IDLE):
            if heard is None:
                yield None
                continue
            choice, event = self.choices[heard[0]], heard[1]
            if isinstance(event, Token):
                piece = choice.take(event, self.asked.logs)
                if choice.ended:
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
        async for found in self.pieces():
            if found is not None:
                choice, piece, _ = found
                all_of = said[choice.number]
                all_of.text += piece.text
                all_of.entries += piece.entries
                all_of.calls += piece.calls
        return self.shape.whole(self.choices, said, self.usage())

    async def events(self) -> AsyncIterator[Mapping[str, Any] | None]:
        """The answer in pieces."""
        opened: set[int] = set()
        async for found in self.pieces():
            if found is None:
                yield None
                continue
            choice, piece, last = found
            if choice.number not in opened:
                opened.add(choice.number)
                for event in self.shape.opening(choice):
                    yield event
            if last:
                for event in self.shape.closing(choice, piece):
                    yield event
            elif piece:
                for event in self.shape.piece(choice, piece):
                    yield event
        used = self.shape.used(self.usage())
        if used is not None:
            yield used

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
