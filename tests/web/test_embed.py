"""/v1/embeddings over a socket: what a vector is, whose it is, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("starlette", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(package)

from served import Client, error_of, serving, write_house

from pylora.errors import ConfigError
from pylora.model.llama import Llama
from pylora.types import Seqs
from pylora.web.server import Server

PATH = "/v1/embeddings"
TEXTS = ["truth exists:", "life is", "time " * 40, "t"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_house(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module", params=["last", "mean"])
def server(house: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(house, pooling=request.param, prefill_chunk=16) as running:
        yield running


def vectors(answer: tuple[int, Any]) -> np.ndarray:
    status, said = answer
    assert status == 200 and said["object"] == "list", said
    assert [d["index"] for d in said["data"]] == list(range(len(said["data"])))
    return np.array([d["embedding"] for d in said["data"]])


def by_layers(model: Llama, ids: list[int], pooling: str) -> np.ndarray:
    """The rows behind the last norm, layer by layer, as one of length 1."""
    n = len(ids)
    seqs = Seqs(np.array([0, n]), np.array([0]), np.array([n]))
    x, _ = model.trunk.forward(
        np.array(ids), seqs, np.arange(n), None, model.trunk.lowest, False
    )  # fmt: skip
    rows = model.ops.norm_forward(x, model.norm)[0].astype(np.float64)
    row = rows[-1] if pooling == "last" else rows.mean(axis=0)
    return row / np.linalg.norm(row)


def test_a_vector_is_of_the_last_norm_and_of_length_1(server: Server) -> None:
    client, model = Client(server.url), server.model
    for text, got in zip(TEXTS, vectors(client.post(PATH, {"input": TEXTS}))):
        ids = model.tokenizer.encode(text, bos=model.tokenizer.add_bos)
        pooling = server.house.pooling
        assert pooling is not None
        want = by_layers(model.llama, ids, pooling)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
        by_ids = vectors(client.post(PATH, {"input": ids, "model": "tiny"}))
        np.testing.assert_array_equal(by_ids[0], got)


def test_a_text_has_the_bits_that_it_has_alone(server: Server) -> None:
    client = Client(server.url)
    names = ["tiny", "legal", "verse"]
    alone = {
        (name, text): vectors(client.post(PATH, {"input": text, "model": name}))[0]
        for name in names
        for text in TEXTS
    }
    assert (alone["tiny", "life is"] != alone["legal", "life is"]).any()

    def ask(i: int) -> None:
        one = Client(server.url)
        if i % 3 == 2:
            one.post("/v1/completions", {"prompt": TEXTS[i % 4], "max_tokens": 8, "model": "legal"})
            return
        name, texts = names[i % 3], TEXTS[i % 4 :] + TEXTS[: i % 4]
        got = vectors(one.post(PATH, {"input": texts, "model": name}))
        for text, row in zip(texts, got):
            np.testing.assert_array_equal(row, alone[name, text])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))


def test_openais_client_has_the_same_numbers(server: Server) -> None:
    library = pytest.importorskip("openai")
    client = library.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    plain = Client(server.url).post(PATH, {"input": TEXTS[:2], "encoding_format": "float"})
    made = client.embeddings.create(model="tiny", input=TEXTS[:2])  # base64, unless told otherwise
    assert [d.embedding for d in made.data] == vectors(plain).astype(np.float32).tolist()
    assert made.usage.prompt_tokens == made.usage.total_tokens > 0
    _, said = Client(server.url).post(PATH, {"input": "t", "encoding_format": "base64"})
    raw = np.frombuffer(base64.b64decode(said["data"][0]["embedding"]), "<f4")
    assert raw.size == server.engine.model.config.hidden_size


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"dimensions": 3}, "a part of them means nothing"),
        ({"input": []}, "must be a text, a list of token ids"),
        ({"input": [["a"]]}, "input[0][0] must be a token's id"),
        ({"input": [10**9]}, "the model has the tokens"),
        ({"input": "time " * 600}, "shorten it"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"temperature": 1}, "no field 'temperature'"),
    ],
    ids=str,
)
def test_what_is_refused(server: Server, more: dict[str, Any], said: str) -> None:
    status, body = Client(server.url).post(PATH, {"input": "a", **more})
    assert status == 400 and said in error_of(status, body)["message"]


def test_without_a_pooling_there_are_none(house: Path) -> None:
    with serving(house) as plain:
        status, body = Client(plain.url).post(PATH, {"input": "a"})
        assert status == 400 and "--pooling" in error_of(status, body)["message"]
        status, _ = Client(plain.url).post(PATH, {"input": "a", "model": "stranger"})
        assert status == 404
    with pytest.raises(ConfigError, match="pooling must be last or mean"):
        Server(house / "model", pooling="cls")
