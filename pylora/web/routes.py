"""Every path of the server: what it takes, what it gives, and who may ask for it.

One table, `routes`, from which the application and /openapi.json are made. Endpoints raise Problem
for what a client can mend; `guarded` turns all errors into OpenAI's error object.
"""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from pylora.web import ask, log, problem, schemas, shapes, wire
from pylora.web.answers import Way, answer
from pylora.web.embed import embed
from pylora.web.fields import Field, Record
from pylora.web.house import House
from pylora.web.keys import Key
from pylora.web.openapi import description
from pylora.web.problem import Problem, malformed
from pylora.web.route import Endpoint, Route

Body = Mapping[str, Any]
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
NOBODY = Key("", frozenset(), False)


def guarded(house: House, route: Route) -> Callable[[HttpRequest], Awaitable[Response]]:
    """The endpoint with keys, errors, and a line in the log."""

    async def handle(request: HttpRequest) -> Response:
        client = request.client.host if request.client else ""
        note = log.Note(request.method, request.url.path[:200], client)
        given = request.headers.get("x-request-id", "")
        note.id = given if _ID.fullmatch(given) else note.id
        headers = {"X-Request-Id": note.id}
        try:
            who = NOBODY
            if route.key:
                who = house.keys.who(
                    request.headers.get("authorization"), request.headers.get("x-api-key")
                )
                note.key = who.name
            response = await route.endpoint(house, request, who, note)
            if isinstance(response, wire.Watched):  # it says itself how it ends
                return response
            response.headers.update(headers)
        except ClientDisconnect:
            note.error = "the client has gone"
            response = Response(status_code=400)
        except Exception as error:
            said = problem.of(error)
            if said.status == 500:
                log.failure(note, error)
            note.error = str(said)
            response = wire.refused(said, headers)
        note.status = response.status_code
        house.metrics.request(route.path, note.status, time.monotonic() - note.began)
        if route.path not in _QUIET or note.status >= 400:
            log.answered(note)
        return response

    return handle


_QUIET = ("/health", "/metrics")  # asked every few seconds by machines


def _way(way: Way) -> Endpoint:
    async def endpoint(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
        return await answer(house, way, request, who, note)

    return endpoint


def _reads(work: Callable[[House, Key, Any], Any], body: Record | Field) -> Endpoint:
    """An endpoint that reads a body and gives an object, both in a thread."""

    async def endpoint(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
        data = await wire.read_bytes(request, house.limits.body)

        def run() -> Any:
            return work(house, who, body(wire.parsed(data), ""))

        said = await house.aside(run)
        return PlainTextResponse(said) if isinstance(said, str) else wire.Json(said)

    return endpoint


def _gives(work: Callable[[House, Key, HttpRequest], Any]) -> Endpoint:
    async def endpoint(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
        return wire.Json(work(house, who, request))

    return endpoint


# ---- models and adapters ----------------------------------------------------------------------


def model_of(house: House, name: str, who: Key) -> dict[str, Any]:
    """OpenAI's object of a model, with vLLM's fields and what the page needs."""
    base = name == house.shelf.base
    said: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": house.created,
        "owned_by": "pylora",
        "root": name,
        "parent": None if base else house.shelf.base,
        "max_model_len": house.limits.context,
    }
    if base:
        said |= {"chat": house.tokenizer.chat_template is not None, "precision": house.precision}
        return said
    info = house.shelf.registry.get(name)
    if who.manage and info.directory is not None:  # where things lie is nobody else's business
        said["root"] = str(info.directory)
    return said | {"rank": info.rank, "digest": info.digest, "pinned": info.pinned}


def _models(house: House, who: Key, request: HttpRequest) -> Any:
    names = [house.shelf.base, *house.shelf.names(who)]
    return {"object": "list", "data": [model_of(house, name, who) for name in names]}


def _model(house: House, who: Key, request: HttpRequest) -> Any:
    name = request.path_params["name"]
    if name != house.shelf.base and name not in house.shelf.names(who):
        raise house.shelf.missing(who, name)
    return model_of(house, name, who)


def _set_scales(house: House, who: Key, scaled: Any) -> Any:
    house.shelf.set_scales(who, scaled)
    return {"success": True}


# ---- words ------------------------------------------------------------------------------------


def _tokenize(house: House, who: Key, body: Body) -> Any:
    _, mix = house.shelf.chosen(who, body)
    tokenizer, grammars = house.words(mix)
    given = [name for name in ("prompt", "content", "messages") if name in body]
    if len(given) != 1:
        raise malformed("give one of prompt, content (llama.cpp's name for it) and messages")
    if given == ["messages"]:
        ids = ask.rendered(tokenizer, body, body.get("tools")).ids
    else:
        # vLLM adds what a sequence starts with unless told otherwise, llama.cpp only when told.
        adds = given == ["prompt"]
        adds = body.get("add_special_tokens", body.get("add_special", adds))
        ids = tokenizer.encode(body[given[0]], bos=adds and tokenizer.add_bos)
    said: dict[str, Any] = {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": house.limits.context,
        "token_strs": None,
    }
    pieces = [grammars.bytes_of(i).decode("utf-8", "replace") for i in ids]
    if body.get("return_token_strs"):
        said["token_strs"] = pieces
    if body.get("with_pieces"):
        said["tokens"] = [{"id": i, "piece": piece} for i, piece in zip(ids, pieces)]
    return said


def _detokenize(house: House, who: Key, body: Body) -> Any:
    _, mix = house.shelf.chosen(who, body)
    tokenizer, _ = house.words(mix)
    text = tokenizer.decode(body["tokens"], skip_special_tokens=False)
    return {"prompt": text, "content": text}


# ---- operation --------------------------------------------------------------------------------


async def _health(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
    if house.ending:
        raise problem.closing()
    if house.stuck():
        raise Problem(503, "the engine makes no steps", code="stuck", kind="server_error")
    return wire.Json({"status": "ok"})


async def _metrics(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
    who.must_manage()
    text, kind = house.metrics.text()
    return Response(text, media_type=kind)


async def _openapi(house: House, request: HttpRequest, who: Key, note: log.Note) -> Response:
    return wire.Json(description(ROUTES, house))


CHAT = Way("/v1/chat/completions", schemas.CHAT, ask.chat, shapes.Chat)
COMPLETION = Way("/v1/completions", schemas.COMPLETION, ask.completion, shapes.Completion)
LLAMA = Way("/completion", schemas.LLAMA_COMPLETION, ask.llama_completion, shapes.Llama)
ROUTES: tuple[Route, ...] = (
    Route("/v1/models", "GET", "the base and each adapter", _gives(_models)),
    Route("/v1/models/{name:path}", "GET", "one of them", _gives(_model)),
    Route(CHAT.path, "POST", "an answer in a conversation", _way(CHAT), CHAT.body),
    Route(COMPLETION.path, "POST", "text that goes on", _way(COMPLETION), COMPLETION.body),
    Route(LLAMA.path, "POST", "the same, in llama.cpp's words", _way(LLAMA), LLAMA.body),
    Route(
        "/v1/embeddings",
        "POST",
        "texts as vectors",
        embed,
        schemas.EMBEDDING,
    ),
    Route(
        "/v1/load_lora_adapter",
        "POST",
        "loads an adapter",
        _reads(lambda house, who, body: house.shelf.load(who, body), schemas.LOAD),
        schemas.LOAD,
    ),
    Route(
        "/v1/unload_lora_adapter",
        "POST",
        "forgets an adapter",
        _reads(lambda house, who, body: house.shelf.unload(who, body), schemas.UNLOAD),
        schemas.UNLOAD,
    ),
    Route(
        "/lora-adapters",
        "GET",
        "llama.cpp's list of adapters",
        _gives(lambda house, who, request: house.shelf.scales(who)),
    ),
    Route(
        "/lora-adapters",
        "POST",
        "the scales of requests that name no model",
        _reads(_set_scales, schemas.SCALES),
        schemas.SCALES,
    ),
    Route(
        "/tokenize", "POST", "ids of a text", _reads(_tokenize, schemas.TOKENIZE), schemas.TOKENIZE
    ),
    Route(
        "/detokenize",
        "POST",
        "the text of ids",
        _reads(_detokenize, schemas.DETOKENIZE),
        schemas.DETOKENIZE,
    ),
    Route("/health", "GET", "whether it answers", _health, key=False),
    Route("/metrics", "GET", "numbers for Prometheus", _metrics),
    Route("/openapi.json", "GET", "this description", _openapi, key=False),
)
