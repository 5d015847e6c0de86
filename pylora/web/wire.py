"""Bodies in and answers out: JSON that is read with care, objects and events that are written.

A body must say that it is JSON: a page of another site can make a browser send text, but not that,
so it cannot use a server that listens on this machine.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pylora.web.problem import Problem, malformed

_CHARSET = re.compile(r'charset\s*=\s*"?([^\s";]+)')
_PATIENCE = 60.0  # seconds for a body to come
Events = AsyncIterator[list[dict[str, Any]] | None]


async def read_bytes(request: Request, limit: int) -> bytes:
    """The body. Problem: too large (413), too slow (408), not said to be JSON (415)."""
    said, _, more = request.headers.get("content-type", "").lower().partition(";")
    said = said.strip()
    if said != "application/json" and not (
        said.startswith("application/") and said.endswith("+json")
    ):
        raise Problem(
            415,
            "the body must be JSON and say so (Content-Type: application/json), got "
            f"{said[:100]!r}",
            code="unsupported_media_type",
        )
    charset = _CHARSET.search(more)
    if charset is not None and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(
            415,
            f"the body must be UTF-8, as JSON is; its Content-Type says {charset[1][:40]!r}",
            code="unsupported_media_type",
        )
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise Problem(
            415,
            f"the body is packed (Content-Encoding: {packed[:40]!r}); send it as it is",
            code="unsupported_media_type",
            headers={"Accept-Encoding": "identity"},
        )
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)
    try:
        return await asyncio.wait_for(_all(request, limit), _PATIENCE)
    except asyncio.TimeoutError:
        raise Problem(408, "the body did not come in time", code="request_timeout") from None


async def _all(request: Request, limit: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
    return b"".join(parts)


def _too_large(limit: int) -> Problem:
    return Problem(
        413,
        f"the body is larger than {limit:,} bytes, which is this server's limit (--max-body)",
        code="body_too_large",
        headers={"Connection": "close"},  # the rest of it is not read
    )


def parsed(data: bytes) -> Any:
    """The JSON value of a body. Problem for anything else, for NaN, for names that come twice."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise malformed(f"the body is not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise malformed("the body is JSON of more levels than anything here has") from None
    except ValueError as error:
        raise malformed(f"the body is no JSON: {str(error)[:200]}") from None


def _constant(name: str) -> NoReturn:
    raise malformed(f"the body has {name}, which is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise malformed(f"the body has the field {twice[:80]!r} twice; which is meant?", twice[:80])
    return found


def dumped(value: Any) -> bytes:
    """As compact JSON. Half of a surrogate pair, which a client may have sent, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


class Json(JSONResponse):
    """An object as the answer."""

    def render(self, content: Any) -> bytes:
        """Compact, UTF-8."""
        return dumped(content)


def refused(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """OpenAI's error object with its status."""
    return Json(problem.body(), problem.status, {**problem.headers, **(headers or {})})


class Watched(Response):
    """An answer that takes a while: who hangs up meanwhile ends it.

    `run(send_start, send_part)` makes the answer; it is cancelled when the client is gone.
    """

    def __init__(self, run: Callable[[Send], Awaitable[None]]) -> None:
        self._run = run
        self.background = None
        self.status_code = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._run(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
            with suppress(asyncio.CancelledError, OSError, ClientDisconnect):
                await work
        finally:
            for task in (work, gone):
                if not task.done():
                    task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, response: Response) -> None:
    """A whole response by way of `send`."""
    await send(
        {
            "type": "http.response.start",
            "status": response.status_code,
            "headers": response.raw_headers,
        }
    )
    await send({"type": "http.response.body", "body": bytes(response.body)})


async def send_events(
    send: Send,
    events: Events,
    headers: Mapping[str, str],
    broke: Callable[[Problem], None] = lambda problem: None,
) -> None:
    """Events as a stream, those of a list at once; None keeps the connection open. A Problem that
    comes on the way is the last event, and `broke` hears of it. One that comes before the first
    event is raised: nothing has been sent then."""
    first: list[list[dict[str, Any]] | None] = []
    async for some in events:
        first.append(some)
        break
    raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    raw += [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx sends each event on
    ]
    await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def part(body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    try:
        for some in first:
            await part(_lines(some))
        async for some in events:
            await part(_lines(some))
        await part(b"data: [DONE]\n\n")
    except Problem as problem:
        broke(problem)
        await part(_lines([problem.body()]))
    await send({"type": "http.response.body", "body": b""})


def _lines(events: list[dict[str, Any]] | None) -> bytes:
    if events is None:
        return b": waiting\n\n"
    return b"".join([b"data: " + dumped(event) + b"\n\n" for event in events])
