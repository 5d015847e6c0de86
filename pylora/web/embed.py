"""/v1/embeddings: texts as vectors, by the rows behind the model's last norm.

A model that writes text was not trained for it, and its files name no way to make one vector of a
text's rows: so whoever runs the server says which (`--pooling`), and without that it is refused.
The vectors have the length 1. They come from the engine like answers: in batches with them, by the
adapters that the request names, with the bits that each text has alone.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pylora.serving.request import Done, Event, Pooled, Request
from pylora.web import log, wire
from pylora.web.ask import prompts_of
from pylora.web.flight import Flight, ended_badly
from pylora.web.house import House
from pylora.web.keys import Key
from pylora.web.landing import landing
from pylora.web.metrics import label
from pylora.web.problem import Problem, malformed
from pylora.web.schemas import EMBEDDING


class _Job:
    """One body on its way."""

    def __init__(self, house: House, who: Key, note: log.Note) -> None:
        self.house, self.who, self.note = house, who, note
        self.flight = Flight(house.engine, house.bell())
        self.model, self.encoding, self.adapters = "", "float", ""
        self.rows: list[np.ndarray | None] = []
        self.tokens = 0

    def prepare(self, data: bytes) -> None:
        """Reads the body and submits its texts. In a thread."""
        house, body = self.house, EMBEDDING(wire.parsed(data))
        self.model, mix = house.shelf.chosen(self.who, body)
        if house.pooling is None:
            raise Problem(
                400,
                f"{house.shelf.base!r} is a model that writes text, and its files name no pooling: "
                "it has no embeddings here; start the server with --pooling last or mean if its "
                "last layer is to be taken as one",
                param="model",
                code="embeddings_not_supported",
            )
        size = house.engine.model.config.hidden_size
        if body.get("dimensions", size) != size:
            raise malformed(
                f"dimensions: an embedding of this model has {size} numbers, and a part of them "
                "means nothing; leave it out",
                "dimensions",
            )
        self.encoding = body.get("encoding_format", "float")
        tokenizer, _ = house.words(mix)
        prompts = prompts_of(house, tokenizer, body["input"], "input")
        seconds = house.limits.seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        for prompt in prompts:
            house.limits.tokens(len(prompt.ids), 0)
        self.tokens, self.rows = sum(len(p.ids) for p in prompts), [None] * len(prompts)
        self.adapters = self.note.adapter = label(mix)
        self.note.prompt = self.tokens
        self.flight.submit(
            [
                Request(
                    prompt.ids, 0, adapters=mix, pooling=house.pooling, deadline=deadline,
                    key=self.who.name,
                )
                for prompt in prompts
            ]
        )  # fmt: skip

    async def hear(self) -> None:
        """Waits for all rows. Problem where one does not come."""
        async for heard in self.flight.events():
            for i, event in heard or ():
                self._take(i, event)

    def _take(self, i: int, event: Event) -> None:
        """One event of one text. Problem where its row does not come."""
        if isinstance(event, Pooled):
            self.rows[i] = event.row
        if isinstance(event, Done):
            self.house.metrics.answer(self.adapters, event.reason, event.usage)
            if event.reason == "deadline":
                raise Problem(
                    408, "the server's time for one request is over", code="request_timeout"
                )
        problem = ended_badly(event)
        if problem is not None:
            raise problem

    def answer(self) -> Mapping[str, Any]:
        """OpenAI's object."""
        data = [
            {"object": "embedding", "index": i, "embedding": _written(row, self.encoding)}
            for i, row in enumerate(self.rows)
            if row is not None
        ]
        usage = {"prompt_tokens": self.tokens, "total_tokens": self.tokens}
        return {"object": "list", "data": data, "model": self.model, "usage": usage}

    async def send(self, send: Any) -> None:
        """The response. Whoever hangs up cancels it."""
        headers = {"X-Request-Id": self.note.id}
        way = (self.house, "/v1/embeddings", self.flight, self.note)
        async with landing(*way, send, headers, time.monotonic()):
            await self.hear()
            said = await self.house.aside(self.answer)
            await wire.send_json(send, wire.Json(said, 200, headers))


def _written(row: np.ndarray, encoding: str) -> Any:
    """A row of the length 1, as numbers or as the base64 of float32, low byte first."""
    length = float(np.sqrt((row * row).sum()))
    unit = (row / length if length else row).astype("<f4")
    if encoding == "base64":
        return base64.b64encode(unit.tobytes()).decode("ascii")
    return unit.tolist()


async def embed(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
    """The endpoint. Problem for what cannot be answered."""
    data = await wire.read_bytes(request, house.limits.body)
    job = _Job(house, who, note)
    try:
        await house.aside(lambda: job.prepare(data))
    except BaseException:
        job.flight.close()
        raise
    return wire.Watched(job.send)
