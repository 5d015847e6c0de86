"""The server over a real socket: clients of three kinds, adapters, keys, limits, its end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(package)

from served import Client, error_of, serving, slowed, write_adapter, write_house

import pylora
from pylora.errors import ConfigError, FileFormatError
from pylora.generation.generate import generate
from pylora.web.server import Server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = [{"role": "user", "content": "truth exists:"}]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def server(house: Path) -> Iterator[Server]:
    with serving(house) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Client:
    return Client(server.url)


def text_of(answer: tuple[int, Any]) -> str:
    status, said = answer
    assert status == 200, said
    choice = said["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


# ---- OpenAI's own client ----------------------------------------------------------------------


@pytest.fixture
def openai(server: Server) -> Any:
    library = pytest.importorskip("openai")
    return library.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def test_openais_client_lists_models(openai: Any) -> None:
    models = {m.id: m for m in openai.models.list()}
    assert set(models) == {"tiny", "legal", "verse"} and models["legal"].parent == "tiny"
    assert openai.models.retrieve("verse").id == "verse"


def test_openais_client_chats_and_streams_the_same(openai: Any) -> None:
    settings = {"model": "legal", "messages": ASKED, "seed": 5, "max_tokens": 12, "n": 2}
    whole = openai.chat.completions.create(**settings, logprobs=True, top_logprobs=3)
    assert len(whole.choices) == 2 and whole.usage.completion_tokens <= 24
    stream = openai.chat.completions.create(
        **settings, logprobs=True, top_logprobs=3, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    said: dict[int, str] = {0: "", 1: ""}
    logs: dict[int, list[Any]] = {0: [], 1: []}
    ends: dict[int, str] = {}
    for event in stream:
        if not event.choices:
            assert event.usage == whole.usage.model_copy(
                update={"prompt_tokens_details": event.usage.prompt_tokens_details}
            )
        for choice in event.choices:
            said[choice.index] += choice.delta.content or ""
            logs[choice.index] += choice.logprobs.content if choice.logprobs else []
            ends |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    for choice in whole.choices:
        assert said[choice.index] == choice.message.content
        assert logs[choice.index] == choice.logprobs.content
        assert ends[choice.index] == choice.finish_reason
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3 and entry.logprob <= 0
    texts = [c.message.content for c in whole.choices]
    assert texts[0] != texts[1]  # each draws from its own stream


def test_openais_client_completes_embeds_not_and_hears_errors(openai: Any) -> None:
    library = sys.modules["openai"]
    done = openai.completions.create(model="tiny", prompt=["a", "b"], max_tokens=3, n=2, seed=1)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    with pytest.raises(library.BadRequestError, match="no embeddings here"):
        openai.embeddings.create(model="tiny", input="a")
    with pytest.raises(library.NotFoundError, match="no model 'gpt-4'"):
        openai.chat.completions.create(model="gpt-4", messages=ASKED)


def test_an_answer_can_be_had_again_by_its_seed(client: Client) -> None:
    body = {"messages": ASKED, "max_tokens": 10}
    first = client.post(CHAT, body)[1]
    again = client.post(CHAT, {**body, "seed": first["seed"]})[1]
    assert again["choices"] == first["choices"]


def test_answers_are_those_of_generate(server: Server, client: Client) -> None:
    model = server.model
    ids = model.tokenizer.encode("truth exists:")
    for name in (None, "legal", "verse"):
        adapter = None if name is None else server.registry
        with pylora.AdapterPool(model.llama) as pool:
            if adapter is not None and name is not None:
                folder = server.registry.get(name).directory
                assert folder is not None
                pool.add(name, pylora.Adapter.load(folder, model.config.modules()))
            (tokens,) = generate(
                model.llama, [ids], 8, temperature=0.8, seed=3, pool=pool, adapters=[name],
                eos_ids=model.tokenizer.eos_ids,
            )  # fmt: skip
        said = client.post(
            TEXT,
            {
                "model": name or "tiny", "prompt": ids, "max_tokens": 8, "temperature": 0.8,
                "seed": 3, "logprobs": 0,
            },
        )[1]["choices"][0]  # fmt: skip
        wanted = [server.house.grammars.bytes_of(t).decode("utf-8", "replace") for t in tokens]
        assert said["logprobs"]["tokens"] == wanted


# ---- curl, and clients in the manner of llama.cpp's -------------------------------------------


def test_curl(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    body = json.dumps({"model": "verse", "messages": ASKED, "max_tokens": 4, "stream": True})
    args = ["curl", "-sSN", server.url + CHAT, "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(args, capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.startswith("data: {") and said.endswith("data: [DONE]\n\n")
    said = subprocess.run(
        [*args[:3], "-d", body], capture_output=True, text=True, timeout=60
    ).stdout
    assert "Content-Type: application/json" in json.loads(said)["error"]["message"]


def test_llama_cpps_numbers_scales_and_completion(client: Client) -> None:
    listed = client.get("/lora-adapters")[1]
    numbers = {a["name"]: a["id"] for a in listed}
    assert set(numbers) == {"legal", "verse"} and all(a["scale"] == 0 for a in listed)
    ask = {"prompt": "truth exists:", "n_predict": 6, "temperature": 0}
    legal = {"lora": [{"id": numbers["legal"], "scale": 1.0}]}
    named = client.post("/completion", {**ask, **legal})[1]["content"]
    same = {"model": "legal", "prompt": ask["prompt"], "max_tokens": 6, "temperature": 0}
    assert named == text_of(client.post(TEXT, same))
    base = client.post("/completion", ask)[1]["content"]
    assert base != named
    try:
        scales = [{"id": numbers["legal"], "scale": 1.0}]
        assert client.post("/lora-adapters", scales) == (200, {"success": True})
        assert client.post("/completion", ask)[1]["content"] == named
        # Who names the base gets the base, whatever the scales are.
        assert client.post("/completion", {**ask, "model": "tiny"})[1]["content"] == base
        assert client.get("/lora-adapters")[1][numbers["legal"]]["scale"] == 1.0
    finally:
        client.post("/lora-adapters", [])
    assert client.post("/completion", ask)[1]["content"] == base
    events = client.events("/completion", {**ask, "n_probs": 2})
    assert "".join(e["content"] for e in events) == base and events[-1]["stop"] is True
    assert len(events[0]["completion_probabilities"][0]["top_logprobs"]) == 2


# ---- what a request can say -------------------------------------------------------------------


def test_a_mixture_is_a_volume_knob(client: Client) -> None:
    ask: dict[str, Any] = {"prompt": "truth exists:", "max_tokens": 8, "temperature": 0}

    def mixed(**weights: float) -> str:
        listed = [{"name": n, "weight": w} for n, w in weights.items()]
        return text_of(client.post(TEXT, {**ask, "model": "tiny", "adapters": listed}))

    base = text_of(client.post(TEXT, {**ask, "model": "tiny"}))
    legal = text_of(client.post(TEXT, {**ask, "model": "legal"}))
    assert mixed() == mixed(legal=0, verse=0) == base and mixed(legal=1) == legal
    assert len({base, legal, mixed(legal=0.5), mixed(legal=0.7, verse=0.3)}) >= 3


def test_echo_gives_the_prompts_logprobs(server: Server, client: Client) -> None:
    ids = server.model.tokenizer.encode("truth exists:")
    for prompt in ("truth exists:", ids):
        body = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 2, "temperature": 0}
        choice = client.post(TEXT, body)[1]["choices"][0]
        logs = choice["logprobs"]
        assert choice["text"].startswith("truth exists:") and len(logs["tokens"]) == len(ids) + 2
        assert logs["token_logprobs"][0] is None and logs["text_offset"][0] == 0
        assert all(x <= 0 for x in logs["token_logprobs"][1:])
        whole = "".join(e["choices"][0]["text"] for e in client.events(TEXT, body))
        assert whole == choice["text"]
    alone = client.post(TEXT, {**body, "max_tokens": 0})[1]["choices"][0]
    assert alone["text"] == "truth exists:" and alone["finish_reason"] == "length"
    score = server.model.score("truth exists:")
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(
        list(score.logprobs[1:]), abs=1e-4
    )


def test_stop_strings_end_an_answer_and_cancel_the_rest(server: Server, client: Client) -> None:
    body = {"prompt": "truth exists:", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    whole = text_of(client.post(TEXT, body))
    stop = whole[5:8]
    choice = client.post(TEXT, {**body, "stop": [stop, "@@@"], "logprobs": 0})[1]["choices"][0]
    assert choice["text"] == whole[: whole.index(stop)] and choice["stop_reason"] == stop
    assert choice["finish_reason"] == "stop"
    assert sum(len(t) for t in choice["logprobs"]["tokens"]) <= len(choice["text"]) + 12


def test_bias_forbids_and_forces(server: Server, client: Client) -> None:
    token = server.model.tokenizer.encode("a")[0]
    body = {"prompt": "truth", "max_tokens": 4, "temperature": 0, "logit_bias": {str(token): 100}}
    assert text_of(client.post(TEXT, body)) == "aaaa"
    body["presence_penalty"] = 2.0
    assert client.post(TEXT, body)[0] == 200


def test_an_answer_with_a_schema_parses(client: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    for seed in range(4):
        body = {"messages": ASKED, "response_format": form, "max_tokens": 200, "seed": seed}
        said = json.loads(text_of(client.post(CHAT, body)))
        assert set(said) == {"a", "b"} and said["b"] in "xy"
    choice = {"messages": ASKED, "guided_choice": ["yes", "no"], "max_tokens": 20}
    assert text_of(client.post(CHAT, choice)) in ("yes", "no")
    choice = {"messages": ASKED, "structured_outputs": {"regex": "[0-9]{4}"}, "max_tokens": 20}
    assert text_of(client.post(CHAT, choice)).isdigit()


def test_tokens_there_and_back(client: Client) -> None:
    said = client.post("/tokenize", {"prompt": "truth exists:", "return_token_strs": True})[1]
    assert "".join(said["token_strs"]) == "truth exists:" and said["count"] == len(said["tokens"])
    back = client.post("/detokenize", {"tokens": said["tokens"]})[1]
    assert back == {"prompt": "truth exists:", "content": "truth exists:"}
    assert client.post("/tokenize", {"content": "truth exists:"})[1]["tokens"] == said["tokens"]
    chat = client.post("/tokenize", {"messages": ASKED, "return_token_strs": True})[1]
    assert "".join(chat["token_strs"]).endswith("<|im_start|>assistant\n")


# ---- adapters at run time ---------------------------------------------------------------------


def test_adapters_come_go_and_are_replaced(house: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        write_adapter(house / "model", tmp_path / f"new{i}", seed=20 + i)
    outside = write_adapter(house / "model", house / "outside", seed=9)
    ask = {"model": "new", "prompt": "truth exists:", "max_tokens": 6, "temperature": 0}
    with serving(house, load_from=[tmp_path]) as server:
        client = Client(server.url)
        assert client.refused(TEXT, ask)[0] == 404
        load = {"lora_name": "new", "lora_path": str(tmp_path / "new1")}
        status, said = client.post("/v1/load_lora_adapter", load)
        assert (status, said) == (200, "Success: LoRA adapter 'new' added successfully.")
        first = text_of(client.post(TEXT, ask))
        assert "already" in client.refused("/v1/load_lora_adapter", load)[1]["message"]
        load |= {"lora_path": str(tmp_path / "new2"), "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", load)[0] == 200
        assert text_of(client.post(TEXT, ask)) != first
        assert client.post("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 200
        assert client.refused("/v1/unload_lora_adapter", {"lora_name": "new"})[0] == 404
        assert client.refused(TEXT, ask)[0] == 404
        for path in (
            str(outside),
            "../outside",
            str(tmp_path / "new1" / ".." / ".."),
            "/etc",
            "a\0",
        ):
            status, error = client.refused(
                "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": path}
            )
            assert status == 403 and str(house) not in error["message"]
        (tmp_path / "link").symlink_to(outside)
        link = {"lora_name": "x", "lora_path": str(tmp_path / "link")}
        assert client.refused("/v1/load_lora_adapter", link)[0] == 403
        broken = tmp_path / "broken"
        shutil.copytree(tmp_path / "new1", broken)
        (broken / "adapter_model.safetensors").write_bytes(b"\0" * 9)
        status, error = client.refused(
            "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "broken"}
        )
        assert status in (400, 403)
        # A folder that appears among the watched ones is served, and goes again.
        shutil.copytree(tmp_path / "new1", house / "adapters" / "late")
        assert server._watch is not None
        server._watch.look()
        assert "late" in [m["id"] for m in client.get("/v1/models")[1]["data"]]
        shutil.rmtree(house / "adapters" / "late")
        server._watch.look()
        assert "late" not in [m["id"] for m in client.get("/v1/models")[1]["data"]]


# ---- who may what -----------------------------------------------------------------------------


def test_a_key_sees_its_own_adapters_alone(house: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(
        json.dumps([
            {"name": "ann", "key": "ann-secret-1", "adapters": ["legal"]},
            {"name": "bob", "key": "bob-secret-1", "adapters": ["verse"]},
        ])
    )  # fmt: skip
    with serving(house, api_key="master-key-1", api_keys=keys) as server:
        ann, master = Client(server.url, "ann-secret-1"), Client(server.url, "master-key-1")
        ask = {"prompt": "truth", "max_tokens": 2, "temperature": 0}
        assert ann.post(TEXT, {**ask, "model": "legal"})[0] == 200
        assert ann.post(TEXT, {**ask, "model": "tiny"})[0] == 200
        mine = [{"name": "legal"}, {"name": "verse", "weight": 0.1}]
        verse = next(a["id"] for a in master.get("/lora-adapters")[1] if a["name"] == "verse")
        for body in (
            {"model": "verse"},
            {"adapters": mine},
            {"adapters": mine, "model": "legal"},
            {"lora": [{"id": verse, "scale": 1}]},
        ):
            status, error = ann.refused(TEXT, {**ask, **body})
            assert status in (400, 404)
            nobody = ann.refused(TEXT, {**ask, "model": "none"})[1]["message"]
            if "model" in body and body["model"] == "verse":  # as if it were not there
                assert error["message"] == nobody.replace("none", "verse")
        for path, extra in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            assert ann.refused(path, {**extra, "model": "verse"})[0] == 404
        assert [m["id"] for m in ann.get("/v1/models")[1]["data"]] == ["tiny", "legal"]
        assert ann.get("/v1/models/verse")[0] == 404
        assert [a["name"] for a in ann.get("/lora-adapters")[1]] == ["legal"]
        for path in ("/v1/models", "/v1/models/legal", "/lora-adapters"):
            assert str(house) not in json.dumps(ann.get(path)[1])
            assert str(house) in json.dumps(master.get(path)[1])
        for path, body in (
            ("/v1/unload_lora_adapter", {"lora_name": "legal"}),
            ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "legal"}),
            ("/lora-adapters", []),
        ):
            assert ann.refused(path, body)[0] == 403
        assert ann.get("/metrics")[0] == 403 and master.get("/metrics")[0] == 200
        # Scales that the master sets for all give nobody what is not theirs.
        assert master.post("/lora-adapters", [{"id": verse, "scale": 1.0}])[0] == 200
        assert ann.refused(TEXT, ask)[0] == 404
        for key in (None, "wrong-key-123", "ann-secret-1 ", "ann-secret-", "é"):
            status, said = Client(server.url, key and key.encode().decode("latin-1")).post(
                TEXT, ask
            )
            if key != "ann-secret-1 ":
                assert status == 401 and error_of(status, said)["code"] == "invalid_api_key"
        assert Client(server.url).get("/health") == (200, {"status": "ok"})
        page = Client(server.url).raw("GET", "/")
        assert page[0] == 200 and b"ann-secret" not in page[2]


@pytest.mark.parametrize(
    "text", ["{", "[]", '[{"name": "a"}]', '[{"name": "a", "key": "short"}]',
             '[{"name": "a", "sha256": "zz"}]', '[{"name": "a", "key": "k-12345678", "x": true}]',
             '[{"name": "a", "key": "k-12345678"}, {"name": "a", "key": "k-22345678"}]',
             '[{"name": "a", "key": "k-12345678"}, {"name": "b", "key": "k-12345678"}]']
)  # fmt: skip
def test_a_wrong_file_of_keys_is_refused(house: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        Server(house / "model", api_keys=file, port=0)


def test_settings_out_of_range_are_refused(house: Path) -> None:
    for wrong in ({"port": 70000}, {"context": 10**6}, {"grace": -1}, {"max_body": 0},
                  {"api_key": "short"}, {"tls": {"ssl_certfile": "/none"}}, {"tls": {"x": 1}},
                  {"host": "nowhere.invalid"}):  # fmt: skip
        with pytest.raises(ConfigError):
            Server(house / "model", **{"port": 0, **wrong}).start()  # type: ignore[arg-type]
    with pytest.raises(FileFormatError):
        Server(house / "model", adapters=house / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match="cannot be had"):
            Server(house / "model", port=taken.getsockname()[1]).start()


# ---- limits and ends --------------------------------------------------------------------------

LONG = {"prompt": "truth", "max_tokens": 480, "temperature": 0, "ignore_eos": True}


def test_a_full_queue_is_429_with_retry_after(house: Path) -> None:
    with serving(house, max_batch=1, queue=1) as server:
        client = Client(server.url)
        with ThreadPoolExecutor(12) as many:
            sent = [
                many.submit(client.raw, "POST", TEXT, json.dumps(LONG).encode()) for _ in range(12)
            ]
            answers = [s.result() for s in sent]
        assert {status for status, _, _ in answers} == {200, 429}
        for status, headers, data in answers:
            if status == 429:
                assert int(headers["retry-after"]) >= 1 and error_of(429, json.loads(data))
        assert len({data[-200:] for status, _, data in answers if status == 200}) >= 1


def test_who_hangs_up_cancels(server: Server, client: Client) -> None:
    for body in (LONG, {**LONG, "stream": True}):
        before = server.engine.stats().ended.get("cancelled", 0)
        data = json.dumps({**body, "n": 8}).encode()
        with slowed(server), socket.create_connection((client.host, client.port)) as wire:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            wire.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            while not server.engine.stats().running:
                time.sleep(0.001)
        for _ in range(1000):
            if server.engine.stats().ended.get("cancelled", 0) >= before + 8:
                break
            time.sleep(0.01)
        assert server.engine.stats().ended.get("cancelled", 0) == before + 8
    assert server.engine.stats().running == 0


def test_limits_of_bodies_tokens_and_time(house: Path) -> None:
    with serving(house, max_body=2000, max_tokens=20, context=64, timeout=0.05) as server:
        client = Client(server.url)
        assert client.refused(TEXT, {"prompt": "a" * 3000})[0] == 413
        assert client.refused(TEXT, {"prompt": "a", "max_tokens": 21})[0] == 400
        status, error = client.refused(TEXT, {"prompt": "a" * 70, "max_tokens": 1})
        assert (status, error["code"]) == (400, "context_length_exceeded")
        said = client.post(
            CHAT, {"messages": ASKED, "temperature": 0, "ignore_eos": True, "n": 60}
        )[1]
        for choice in said["choices"]:
            assert choice["stop_reason"] in ("deadline", None)


def test_it_ends_gracefully_and_hands_back_what_does_not_end(house: Path) -> None:
    with serving(house) as server:
        client = Client(server.url)
        with ThreadPoolExecutor(1) as other:
            sent = other.submit(client.post, TEXT, LONG)
            while not server.engine.stats().running:
                time.sleep(0.001)
            server.close(30)
            assert sent.result()[1]["choices"][0]["finish_reason"] == "length"  # it was finished
    with serving(house) as server, slowed(server, 0.1), ThreadPoolExecutor(2) as other:
        client = Client(server.url)
        asks = [{**LONG, "n": 2}, {**LONG, "n": 2, "stream": True}]
        sent = [other.submit(client.raw, "POST", TEXT, json.dumps(ask).encode()) for ask in asks]
        while server.engine.stats().requests < 4 or server.engine.stats().steps < 12:
            time.sleep(0.001)
        server.close(0)
        status, headers, data = sent[0].result()
        assert status == 503 and "retry-after" in headers and error_of(503, json.loads(data))
        assert b"shutting_down" in sent[1].result()[2]  # its last event, or all that there is


def test_the_command_serves_until_sigterm(house: Path) -> None:
    args = [sys.executable, "-m", "pylora", "serve", str(house / "model"), "--port", "0"]
    args += ["--adapters", str(house / "adapters"), "--log-format", "json", "--name", "tiny"]
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(json.loads(line) for line in process.stderr if '"listening"' in line)
        assert said["adapters"] == 2 and said["url"].startswith("http://127.0.0.1:")
        assert (
            text_of(Client(said["url"]).post(TEXT, {"prompt": "a secret", "max_tokens": 2})) != "\0"
        )
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    lines = [json.loads(line) for line in rest.splitlines()]
    (line,) = [line for line in lines if line["event"] == "request"]
    assert line["status"] == 200 and line["prompt_tokens"] > 0 and "secret" not in rest
    assert lines[-1]["event"] == "ending"


# ---- operation --------------------------------------------------------------------------------


def test_metrics_count(server: Server, client: Client) -> None:
    client.post(TEXT, {"model": "legal", "prompt": "truth", "max_tokens": 3, "temperature": 0})
    status, text = client.get("/metrics")
    assert status == 200
    numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(numbers['pylora_prompt_tokens_total{adapter="legal"}']) > 0
    for name in ("queued", "running", "steps_total", "kv_tokens", "adapters", "prefix_hit_ratio"):
        assert f"pylora_{name}" in numbers, name
    for name in ("first_token_seconds", "step_seconds", "batch_size", "queue_seconds"):
        assert any(key.startswith(f"pylora_{name}_bucket") for key in numbers), name


def test_headers(server: Server, client: Client, house: Path) -> None:
    status, headers, _ = client.raw("GET", "/health", X_Request_Id="my-id-1", Origin="http://evil")
    assert headers["x-request-id"] == "my-id-1" and "access-control-allow-origin" not in headers
    status, headers, data = client.raw("GET", "/")
    assert "script-src 'self'" in headers["content-security-policy"] and b"http" not in data
    for path in ("/page/app.js", "/page/style.css", "/page/icon.svg"):
        assert client.raw("GET", path)[0] == 200
    assert client.raw("GET", "/page/../server.py")[0] == 404
    with serving(house, cors=("https://good.example",), page=False) as other:
        friend = Client(other.url)
        for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
            headers = friend.raw("GET", "/health", Origin=origin)[1]
            assert (headers.get("access-control-allow-origin") == origin) is allowed
        assert friend.raw("GET", "/")[0] == 404


def test_answers_are_those_of_each_alone_while_all_are_asked_together(client: Client) -> None:
    asks = [
        {"model": model, "prompt": prompt, "max_tokens": 12, "seed": seed, "logprobs": 2}
        for seed, prompt in enumerate(["truth", "life is", "t"])
        for model in ("tiny", "legal", "verse")
    ]
    likeliest, penalties = {"temperature": 0}, {"frequency_penalty": 1.5, "repetition_penalty": 1.3}
    for more in ({"guided_regex": "[a-z ]{6,9}"}, penalties, likeliest, {"top_p": 0.7, "n": 2}):
        asks += [{**ask, **more} for ask in asks[:3]]
    alone = [client.post(TEXT, ask)[1]["choices"] for ask in asks]
    with ThreadPoolExecutor(9) as many:
        together = list(many.map(lambda ask: client.post(TEXT, ask)[1]["choices"], asks))
    assert together == alone


def test_a_server_of_a_loaded_model_leaves_it_open(house: Path) -> None:
    with pylora.load(house / "model", {"mine": house / "adapters" / "legal"}) as model:
        with pylora.Server(model, port=0) as server:
            assert "mine" in [m["id"] for m in Client(server.url).get("/v1/models")[1]["data"]]
        assert isinstance(model.generate("truth", max_new_tokens=2), str)
    assert threading.active_count() < 50
