"""The command line with --backend cuda or cupy, every verb that computes: the user's code and
commands are those of the CPU, and so are the files. Runs where PYLORA_TEST_BACKENDS names those.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora import backends
from pylora.commands import cli
from pylora.formats import open_checkpoint
from pylora.model.llama import Llama

GPU = [n for n in ("cuda", "cupy") if n in os.environ.get("PYLORA_TEST_BACKENDS", "").split(",")]
pytestmark = pytest.mark.skipif(not GPU, reason="PYLORA_TEST_BACKENDS names neither cuda nor cupy")


@pytest.fixture(params=GPU or ["none"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name; which backend this process uses is put back afterwards."""
    before = backends.get().name
    yield str(request.param)
    pylora.use(before)


def test_every_verb(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    models: list[Any] = []
    begin = Llama.__init__

    def noted(self: Any, *args: Any, **kw: Any) -> None:
        begin(self, *args, **kw)
        models.append(self)

    monkeypatch.setattr(Llama, "__init__", noted)

    def run(*args: object) -> str:
        capsys.readouterr()
        assert cli.main(["--backend", backend, *map(str, args)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    model = write_tiny_model(tmp_path / "model")
    data, out = tmp_path / "records.jsonl", tmp_path / "run"
    records = [{"prompt": f"{w} exists:", "completion": f" {w}"} for w in ("truth", "life") * 4]
    data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

    train = "train", model, data, out, "--steps", 4, "--eval", data, "--targets", "q_proj,v_proj"
    run(*train)
    if backend == "cuda":  # all examples are of one of two lengths
        assert models[-1]._steps.captures > 0
    assert {p.name for p in out.iterdir()} >= {"adapter", "log.jsonl"}
    run(*train, "--resume")
    adapter = out / "adapter"
    made = run("generate", model, "truth exists:", "-n", 5, "--adapter", adapter)
    assert models and all(m.ops.name == backend for m in models)
    pylora.use("numpy")
    args = "generate", model, "truth exists:", "-n", 5, "--adapter", adapter
    assert cli.main([str(a) for a in args]) == 0
    assert capsys.readouterr().out == made

    merged, back = tmp_path / "merged", tmp_path / "back"
    assert "modules merged" in run("merge", model, adapter, merged)
    assert "modules unmerged" in run("unmerge", merged, back)
    with open_checkpoint(model) as a, open_checkpoint(back) as b:
        assert all(a.load(name).tobytes() == b.load(name).tobytes() for name in a.names())
        q = "model.layers.0.self_attn.q_proj.weight"
        with open_checkpoint(merged) as c:
            assert not np.array_equal(a.load(q), c.load(q))

    report = run("check", model, "--adapter", adapter, "--tokens", 12)
    assert f"backend {backend}" in report and "FAIL" not in report
    assert backend in run("info")
