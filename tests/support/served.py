"""A small model with adapters behind HTTP, for tests over a socket; and a client of few words."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from tiny_model import write_tiny_model

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats import open_checkpoint
from pylora.web.server import Server


def write_adapter(model: Path, folder: Path, seed: int, size: float = 0.5, r: int = 4) -> Path:
    """An adapter on the attention of the model, with numbers enough to be heard."""
    with open_checkpoint(model) as checkpoint:
        modules = checkpoint.config.modules()
    config = LoraConfig.fresh(r=r, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter = Adapter.init(resolve(config, modules), config)
    rng = np.random.default_rng(seed)
    for lora in adapter.values():
        lora.B[...] = rng.standard_normal(lora.B.shape) * size
    adapter.save(folder)
    return folder


def write_house(where: Path, names: tuple[str, ...] = ("legal", "verse"), **over: Any) -> Path:
    """A folder with model/ and adapters/NAME."""
    model = write_tiny_model(where / "model", **({"max_position_embeddings": 512} | over))
    (where / "adapters").mkdir()
    for i, name in enumerate(names):
        write_adapter(model, where / "adapters" / name, seed=i + 1)
    return where


@contextmanager
def serving(where: Path, **settings: Any) -> Iterator[Server]:
    """What `write_house` wrote, on any free port."""
    given = {"adapters": where / "adapters", "port": 0, "name": "tiny", "kv_bytes": 32 << 20}
    with Server(where / "model", **{**given, **settings}) as server:
        yield server


@contextmanager
def slowed(server: Server, seconds: float = 0.02) -> Iterator[None]:
    """Each step of the engine takes so much longer, so that answers last."""
    before = server.engine._on_step
    server.engine._on_step = lambda report: time.sleep(seconds)
    try:
        yield
    finally:
        server.engine._on_step = before


class Client:
    """Sends one request at a time; answers are (status, what JSON or text came)."""

    def __init__(self, url: str, key: str | None = None) -> None:
        at = urlsplit(url)
        assert at.hostname is not None
        self.host, self.port = at.hostname, at.port
        self.headers = {"Content-Type": "application/json"}
        if key is not None:
            self.headers["Authorization"] = f"Bearer {key}"

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, bytes)."""
        wire = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            given = {**self.headers, **{k.replace("_", "-"): v for k, v in headers.items()}}
            wire.request(method, path, body, given)
            answer = wire.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            wire.close()

    def get(self, path: str) -> tuple[int, Any]:
        """An answer."""
        status, headers, data = self.raw("GET", path)
        return status, read(headers, data)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """An answer."""
        status, headers, data = self.raw("POST", path, json.dumps(body).encode())
        return status, read(headers, data)

    def events(self, path: str, body: Any) -> list[Any]:
        """The events of a stream, without the last one, which must be there."""
        status, headers, data = self.raw(
            "POST", path, json.dumps({**body, "stream": True}).encode()
        )
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), data
        lines = [line for line in data.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", data[-300:]
        return [json.loads(line[6:]) for line in lines[:-1]]

    def refused(self, path: str, body: Any) -> tuple[int, dict[str, Any]]:
        """(status, OpenAI's error object) of a request that must be refused with a sentence."""
        status, said = self.post(path, body)
        return status, error_of(status, said)


def read(headers: dict[str, str], data: bytes) -> Any:
    """JSON, or text."""
    return json.loads(data) if "json" in headers.get("content-type", "") else data.decode()


def error_of(status: int, said: Any) -> dict[str, Any]:
    """The error object, whose form is checked."""
    assert 400 <= status < 500 or status == 503, (status, said)
    assert set(said) == {"error"} and set(said["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = said["error"]
    assert isinstance(error["message"], str) and len(error["message"].split()) >= 3, error
    assert "Traceback" not in error["message"]
    return error
