"""What a path of the server is: data, from which the application and its description are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pylora.web import log
from pylora.web.fields import Field, Record
from pylora.web.house import House
from pylora.web.keys import Key

Endpoint = Callable[[House, HttpRequest, Key, log.Note], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """A path. `body`: what it takes; `key`: whether one is needed, where the server has keys."""

    path: str
    method: str
    what: str
    endpoint: Endpoint
    body: Record | Field | None = None
    key: bool = True
