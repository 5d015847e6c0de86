"""Malformed requests: each class gets a 4xx with OpenAI's error object and a sentence, whatever the
body is; then the server still answers."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(package)

from served import Client, error_of, serving, write_house

from pylora.web.openapi import description
from pylora.web.routes import ROUTES
from pylora.web.server import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_house(tmp_path_factory.mktemp("house")), max_body=1 << 16) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    one = Client(server.url)
    yield one
    assert one.get("/health") == (200, {"status": "ok"})
    assert one.post(TEXT, {"prompt": "a", "max_tokens": 1})[0] == 200


# What is added to a chat that is right: the field that the error names, where it names one.
WRONG_CHAT: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": ["a"]}, "messages[0]"),
    ({"messages": [{"content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, None),
    ({"messages": [{"role": "user", "content": 3}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"messages": [{**MESSAGES[0], "name": 3}]}, "messages[0].name"),
    ({"messages": [{**MESSAGES[0], "tool_call_id": []}]}, "messages[0].tool_call_id"),
    ({"messages": [{**MESSAGES[0], "no_such": 1}]}, "messages[0].no_such"),
    ({"messages": [*MESSAGES, {**MESSAGES[0], "function_call": {}}]}, "messages[1].function_call"),
    ({"messages": [{**MESSAGES[0], "audio": {"id": "a"}}]}, "messages[0].audio"),
    ({"model": 3}, "model"),
    ({"model": ""}, "model"),
    ({"model": "no-such"}, "model"),
    ({"adapters": {"legal": 1}}, "adapters"),
    ({"adapters": [{"weight": 1}]}, "adapters[0].name"),
    ({"adapters": [{"name": "legal", "weight": "loud"}]}, "adapters[0].weight"),
    ({"adapters": [{"name": "legal", "weight": 1e9}]}, "adapters[0].weight"),
    ({"adapters": [{"name": "legal"}, {"name": "legal"}]}, "adapters"),
    ({"adapters": [{"name": "no-such"}]}, "model"),
    ({"adapters": [{"name": "legal"}], "model": "verse"}, "model"),
    ({"adapters": [], "lora": []}, "lora"),
    ({"lora": [{"id": 99, "scale": 1}]}, "lora"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"seed": "x"}, "seed"),
    ({"seed": 10**30}, "seed"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": 3}, "stop"),
    ({"stop": ["a"] * 99}, "stop"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": "x"}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1, "repeat_penalty": 1}, "repeat_penalty"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 200}}, "logit_bias.5"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"tools": [{}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    ({"tools": [TOOL]}, None),  # the tiny model's template has no place for them
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
    ),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_json": {}, "ignore_eos": True}, "ignore_eos"),
    ({"chat_template_kwargs": {"no_such": 1}}, None),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"documents": [{"text": "a"}]}, None),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"timeout": 0}, "timeout"),
    ({"temprature": 1}, "temprature"),
    ({"\n" * 500: 1}, None),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_each_wrong_field_of_a_chat_is_named(client: Client, stream: bool) -> None:
    others = []
    for wrong, param in WRONG_CHAT:
        if stream and param == "stream_options":  # then it is right
            continue
        body = {"messages": MESSAGES, "stream": stream, **wrong}
        status, error = client.refused(CHAT, body)
        assert status in (400, 404), (wrong, error)
        if param is not None and error["param"] != param:
            others.append((wrong, param, error))
    assert not others


WRONG: list[tuple[str, Any]] = [
    (TEXT, {}),
    (TEXT, {"prompt": None}),
    (TEXT, {"prompt": 3}),
    (TEXT, {"prompt": [[]]}),
    (TEXT, {"prompt": []}),
    (TEXT, {"prompt": ["a", 3]}),
    (TEXT, {"prompt": [1, "a"]}),
    (TEXT, {"prompt": [[1], ["a"]]}),
    (TEXT, {"prompt": [-1]}),
    (TEXT, {"prompt": [10**6]}),
    (TEXT, {"prompt": [True]}),
    (TEXT, {"prompt": ["a"] * 1000}),
    (TEXT, {"prompt": "a " * 2000}),
    (TEXT, {"prompt": "a", "logprobs": True}),
    (TEXT, {"prompt": "a", "logprobs": 30}),
    (TEXT, {"prompt": "a", "best_of": 3}),
    (TEXT, {"prompt": "a", "suffix": "b"}),
    (TEXT, {"prompt": "a", "echo": 1}),
    (TEXT, {"prompt": "a", "prompt_logprobs": 1}),
    ("/completion", {"prompt": ["a", "b"]}),
    ("/completion", {"prompt": "a", "n_probs": 99}),
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/embeddings", {}),
    ("/tokenize", {}),
    ("/tokenize", {"prompt": "a", "content": "a"}),
    ("/tokenize", {"messages": []}),
    ("/detokenize", {"tokens": "a"}),
    ("/detokenize", {"tokens": [10**6]}),
    ("/v1/load_lora_adapter", {}),
    ("/v1/load_lora_adapter", {"lora_name": "x"}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "none"}),
    ("/v1/load_lora_adapter", {"lora_name": "tiny", "lora_path": "legal"}),
    ("/v1/load_lora_adapter", {"lora_name": "a\nb", "lora_path": "legal"}),
    ("/v1/unload_lora_adapter", {"lora_name": "none"}),
    ("/lora-adapters", {}),
    ("/lora-adapters", [{"id": 0}]),
    ("/lora-adapters", [{"id": 77, "scale": 1}]),
]
RAW = [
    b"", b"{", b"null", b"[]", b'"a"', b"3", b"\xff\xfe", b'{"prompt": NaN}', b'{"n": Infinity}',
    b'{"prompt": "a", "prompt": "b"}', b"[" * 60000, b'{"a":' * 9000, b'{"prompt": 1e999}',
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "a\\ud800"}', b"\0" * 100,
]  # fmt: skip


def test_other_wrong_bodies_are_refused(client: Client) -> None:
    for path, body in WRONG:
        status, error = client.refused(path, body)
        assert status in (400, 403, 404), (path, body, error)
    for data in RAW:
        for path in (CHAT, TEXT, "/tokenize", "/lora-adapters"):
            if data == b"[]" and path == "/lora-adapters":
                continue
            status, _, answer = client.raw("POST", path, data)
            assert status == 400 and error_of(status, json.loads(answer)), (path, data[:50])


def test_what_is_no_body_of_json_no_method_no_path(client: Client) -> None:
    assert client.raw("POST", TEXT, b"{}", Content_Type="text/plain")[0] == 415
    assert client.raw("POST", TEXT, b"{}", Content_Type="multipart/form-data")[0] == 415
    assert client.raw("POST", TEXT, b" " * (1 << 17))[0] == 413
    for headers in (
        {"Content_Encoding": "gzip"},
        {"Content_Type": "application/json; charset=utf-16"},
    ):
        status, _, data = client.raw("POST", TEXT, b'{"prompt": "a"}', **headers)
        assert status == 415 and error_of(status, json.loads(data))
    plain = client.raw(
        "POST", TEXT, b'{"prompt": "a"}', Content_Type='application/json; charset="UTF-8"'
    )
    assert plain[0] == 200
    for method, path, wanted in (
        ("GET", TEXT, 405), ("DELETE", "/v1/models", 405), ("PUT", CHAT, 405),
        ("GET", "/v1/none", 404), ("GET", "/../etc/passwd", 404), ("POST", "/", 405),
        ("GET", "/v1/models/" + "x" * 3000, 404), ("GET", "/page/%2e%2e/app.py", 404),
    ):  # fmt: skip
        status, headers, data = client.raw(method, path)
        assert status == wanted, (method, path, status)
        error_of(status, json.loads(data))


def test_broken_http_is_no_trouble(server: Server, client: Client) -> None:
    for sent in (
        b"GET\r\n\r\n", b"POST / HTTP/9.9\r\nConnection: close\r\n\r\n", b"\x16\x03\x01" * 50,
        b"POST " + TEXT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST " + TEXT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 20
        + b"\r\nContent-Type: application/json\r\n\r\n{",
        b"POST " + TEXT.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
    ):  # fmt: skip
        answer = talk(client, sent)
        assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 405", b"HTTP/1.1 413")), answer
        error_of(400, json.loads(answer.partition(b"\r\n\r\n")[2]))
    for long in (b"GET /" + b"a" * 200_000, b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 200_000):
        assert talk(client, long).startswith(b"HTTP/1.1 431")


def talk(client: Client, sent: bytes) -> bytes:
    """What comes of some bytes."""
    with socket.create_connection((client.host, client.port), timeout=10) as wire:
        got = b""
        with contextlib.suppress(ConnectionError):  # it closes on what it did not read
            wire.sendall(sent)
            while more := wire.recv(65536):
                got += more
        return got


def test_other_ways_of_http_are_answered(client: Client) -> None:
    body, head = (
        b'{"prompt": "a", "max_tokens": 2}',
        b"Host: x\r\nContent-Type: application/json\r\n",
    )
    sized = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert b'"choices"' in talk(client, b"POST " + TEXT.encode() + b" HTTP/1.0\r\n" + sized)
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    chunked = head + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    assert b'"choices"' in talk(client, b"POST " + TEXT.encode() + b" HTTP/1.1\r\n" + chunked)
    for whole, status in (
        (b"GET http://any.where:81/v1/models", 200), (b"GET HTTPS://any.where", 200),
        (b"GET http://any.where/v1/none?a=b", 404), (b"POST http://any.where/v1/models", 405),
        (b"OPTIONS *", 204), (b"GET *", 400), (b"GET v1/models", 400), (b"GET http:///x", 400),
        (b"CONNECT any.where:443", 400),
    ):  # fmt: skip
        answer = talk(client, whole + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status), (whole, answer)
        if status >= 400:
            error_of(status, json.loads(answer.partition(b"\r\n\r\n")[2]))
    assert client.raw("PUT", "/v1/models")[1]["allow"] == "GET, HEAD"
    assert client.raw("PUT", CHAT)[1]["allow"] == "POST"
    upgrade = b"Host: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n"
    answer = talk(client, b"GET " + TEXT.encode() + b" HTTP/1.1\r\n" + upgrade)
    assert answer.startswith(b"HTTP/1.1 405")


# ---- fuzz -------------------------------------------------------------------------------------

GOOD: list[tuple[str, Any]] = [
    (CHAT, {"messages": MESSAGES, "max_tokens": 2, "n": 2, "stop": ["a"], "logit_bias": {"5": 1},
            "logprobs": True, "top_logprobs": 2, "adapters": [{"name": "legal", "weight": 0.5}],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    (TEXT, {"prompt": [[5, 6], [7]], "max_tokens": 2, "echo": True, "logprobs": 1, "seed": 3,
            "temperature": 0.5, "top_p": 0.5, "guided_regex": "a+", "stream": True}),
    ("/tokenize", {"prompt": "abc", "return_token_strs": True}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
    ("/lora-adapters", [{"id": 0, "scale": 0.0}]),
    ("/completion", {"prompt": "a", "n_predict": 2, "n_probs": 1, "lora": [{"id": 0, "scale": 1}]}),
    ("/v1/load_lora_adapter", {"lora_name": "legal", "lora_path": "legal"}),
]  # fmt: skip
ODD = [
    None, True, False, 0, -1, 1.5, 1e308, -(10**25), "", "a", "\0", "ü" * 300, "\ud83d", [], [[]],
    [None], {}, {"a": {}}, {"": ""}, "NaN", [1, "a"], {"type": "object"}, "../..", 2**63,
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, inside in (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield from places(inside, (*at, key))


def changed(value: Any, chance: random.Random) -> Any:
    """A copy with something else in one to three places."""
    made = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        at = chance.choice(list(places(made)))
        odd = copy.deepcopy(chance.choice(ODD))
        if not at:
            return odd
        inside = made
        for key in at[:-1]:
            inside = inside[key]
        if chance.random() < 0.2:
            if isinstance(inside, dict):
                inside[chance.choice(["x", "model", "n", "stream", "tools", ""])] = odd
            else:
                inside.append(odd)
        elif chance.random() < 0.15:
            del inside[at[-1]]
        else:
            inside[at[-1]] = odd
    return made


def test_fuzzed_bodies_are_answered_or_refused(client: Client) -> None:
    chance = random.Random(7)
    counts: dict[int, int] = {}
    for _ in range(400):
        path, body = chance.choice(GOOD)
        status, headers, data = client.raw("POST", path, json.dumps(changed(body, chance)).encode())
        counts[status] = counts.get(status, 0) + 1
        assert status in (200, 400, 403, 404), (status, data)
        if status != 200:
            error_of(status, json.loads(data))
    assert counts[200] > 10 and counts[400] > 100


def test_fuzzed_bytes_are_refused(client: Client) -> None:
    chance = random.Random(8)
    for _ in range(150):
        path, body = chance.choice(GOOD)
        data = bytearray(json.dumps(body).encode())
        for _ in range(chance.randint(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        status, _, answer = client.raw("POST", path, bytes(data))
        assert status in (200, 400, 403, 404), (bytes(data), answer)


# ---- the description --------------------------------------------------------------------------


def test_the_description_lists_every_path_and_field(server: Server, client: Client) -> None:
    said = client.get("/openapi.json")[1]
    assert said == json.loads(json.dumps(description(ROUTES, server.house)))
    for route in ROUTES:
        at = said["paths"][route.path.replace(":path}", "}")][route.method.lower()]
        assert at["summary"] and {"200", "4XX"} <= set(at["responses"])
    chat = said["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "adapters", "guided_json", "user"} <= set(chat["properties"])
    assert chat["required"] == ["messages"] and chat["additionalProperties"] is False


def test_answers_are_as_described(client: Client) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    said = client.get("/openapi.json")[1]
    for path, body in (
        (CHAT, {"messages": MESSAGES, "max_tokens": 2}),
        (TEXT, {"prompt": "a", "max_tokens": 2, "logprobs": 1}),
        ("/completion", {"prompt": "a", "n_predict": 2}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        good = said["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]
        jsonschema.validate(client.post(path, body)[1], good["schema"])
    for path in ("/v1/models", "/lora-adapters", "/health"):
        good = said["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]
        jsonschema.validate(client.get(path)[1], good["schema"])


def test_the_path_of_the_house_is_in_no_error(client: Client, tmp_path: Path) -> None:
    load = {"lora_name": "x", "lora_path": str(tmp_path)}
    assert str(tmp_path) not in json.dumps(client.post("/v1/load_lora_adapter", load)[1])
