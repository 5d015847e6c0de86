"""/openapi.json: made from the table of routes and the fields of their bodies, so it cannot lag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pylora.web.house import House
from pylora.web.route import Route

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_MAYBE: Schema = {"type": ["string", "null"]}
ERROR = _object(error=_object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE))
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_HEAD: Mapping[str, Schema] = {
    "id": _TEXT, "object": _TEXT, "created": _COUNT, "model": _TEXT, "usage": _USAGE,
    "seed": _COUNT,
}  # fmt: skip
_ENDED: Mapping[str, Schema] = {
    "index": _COUNT,
    "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    "stop_reason": _MAYBE,
    "logprobs": {"type": ["object", "null"]},
}
MODEL = _object(id=_TEXT, object=_TEXT, created=_COUNT, owned_by=_TEXT, root=_TEXT, parent=_MAYBE)
_MESSAGE = _object(role=_TEXT, content=_MAYBE)
GIVES: Mapping[tuple[str, str], Schema] = {
    ("GET", "/v1/models"): _object(object=_TEXT, data=_list(MODEL)),
    ("GET", "/v1/models/{name:path}"): MODEL,
    ("POST", "/v1/chat/completions"): _object(
        **_HEAD, choices=_list(_object(**_ENDED, message=_MESSAGE))
    ),
    ("POST", "/v1/completions"): _object(**_HEAD, choices=_list(_object(**_ENDED, text=_TEXT))),
    ("POST", "/completion"): _object(
        content=_TEXT, stop={"type": "boolean"}, tokens_predicted=_COUNT, tokens_evaluated=_COUNT
    ),
    ("GET", "/lora-adapters"): _list(_object(id=_COUNT, path=_TEXT, scale={"type": "number"})),
    ("POST", "/lora-adapters"): _object(success={"const": True}),
    ("POST", "/tokenize"): _object(tokens=_list({}), count=_COUNT, max_model_len=_COUNT),
    ("POST", "/detokenize"): _object(prompt=_TEXT, content=_TEXT),
    ("GET", "/health"): _object(status=_TEXT),
    ("GET", "/openapi.json"): {"type": "object"},
}
_PLAIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/metrics")
_STREAMS = ("/v1/chat/completions", "/v1/completions", "/completion")


def description(routes: Sequence[Route], house: House) -> Schema:
    """The description, OpenAPI 3.1."""
    import pylora

    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, bool(house.keys))
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pylora",
            "version": pylora.__version__,
            "description": "One base model, many LoRA adapters. OpenAI's interface, with vLLM's "
            "and llama.cpp's for adapters.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: Route, keys: bool) -> Schema:
    good: Schema = {"description": route.what}
    kind = (route.method, route.path)
    if kind in GIVES:
        good["content"] = {"application/json": {"schema": GIVES[kind]}}
        if route.path in _STREAMS:
            good["content"]["text/event-stream"] = {"schema": _TEXT}
    elif route.path in _PLAIN:
        good["content"] = {"text/plain": {"schema": _TEXT}}
    wrong = {
        "description": "OpenAI's error object, with a sentence",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    said: Schema = {
        "summary": route.what,
        "operationId": f"{route.method.lower()}{route.path}".replace("/", "_").replace("-", "_")
        .partition("{")[0].rstrip("_") + ("_one" if "{" in route.path else ""),
        "responses": {"200": good, "4XX": wrong, "5XX": wrong},
    }  # fmt: skip
    if "{name" in route.path:
        said["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    if route.body is not None:
        content = {"application/json": {"schema": route.body.schema}}
        said["requestBody"] = {"required": True, "content": content}
    if route.key and keys:
        said["security"] = [{"key": []}]
    return said
