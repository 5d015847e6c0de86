"""How a request ends, whatever endpoint it came to: answers to failures, the log, the counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.types import Send

from pylora.web import log, wire
from pylora.web.flight import Flight
from pylora.web.house import House
from pylora.web.problem import Problem


@asynccontextmanager
async def landing(
    house: House,
    path: str,
    flight: Flight,
    note: log.Note,
    send: Send,
    headers: Mapping[str, str],
    began: float,
) -> AsyncIterator[None]:
    """The block sends an answer. What it raises is answered, logged and counted; whoever hangs up
    cancels it, and with it the requests of `flight`. `began`: time.monotonic() at its beginning."""
    status = 200
    try:
        yield
    except Problem as problem:
        status, note.error = problem.status, str(problem)
        await wire.send_json(send, wire.refused(problem, headers))
    except asyncio.CancelledError:
        status, note.error = 499, "the client has gone"
        raise
    except Exception as error:  # a fault of ours: the client gets a sentence, the log the rest
        status = 500
        log.failure(note, error)
        raise
    finally:
        flight.close()
        note.status = note.status or status
        house.metrics.request(path, note.status, time.monotonic() - began)
        log.answered(note)
