"""`pylora eval`: the base beside the adapter, in figures that a log has, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import DATA, write_tiny_model

from pylora.commands import cli


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("there")
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model, out = write_tiny_model(folder / "model"), folder / "run"
    args = ["train", model, data, out, "--steps", 60, "--lr", 0.03, "--eval", data]
    assert cli.main([*map(str, args), "--eval-every", "60", "--metric", "token-accuracy"]) == 0
    return {"model": str(model), "data": str(data), "run": str(out)}


def test_before_stands_beside_after(
    there: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", there["model"], there["data"], "--adapter", there["run"]]
    assert cli.main([*args, "--json"]) == 0
    got: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert got["records"] == 8 and got["adapter"]["loss"] < got["base"]["loss"] - 0.5
    assert set(got["base"]) == {"loss", "perplexity", "exact_match", "token_accuracy"}
    log = [json.loads(line) for line in (Path(there["run"]) / "log.jsonl").open()]
    seen = [line for line in log if "eval_loss" in line]
    assert [seen[0]["eval_loss"], seen[-1]["eval_loss"]] == [
        got["base"]["loss"], got["adapter"]["loss"]
    ]  # fmt: skip
    assert seen[-1]["eval_token_accuracy"] == got["adapter"]["token_accuracy"]
    assert cli.main([*args, "--show", "2", "--metric", "exact"]) == 0
    shown = capsys.readouterr().out
    assert "8 records" in shown and "base" in shown and shown.count("expected  ") == 2


def test_forms_of_answers(
    there: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "json.jsonl"
    record = {"prompt": "truth", "completion": ' {"a": 1}'}
    data.write_text(json.dumps(record) + "\n", encoding="utf-8")
    assert cli.main(["eval", there["model"], str(data), "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert set(got) == {"records", "base"} and "json_valid" in got["base"]
    assert cli.main(["eval", there["model"], str(data), "--metric", "regex:[", "--json"]) == 1
    assert "no regular expression" in capsys.readouterr().err
    data.write_text('{"text": "truth exists"}\n', encoding="utf-8")
    assert cli.main(["eval", there["model"], str(data), "--json"]) == 0
    assert "token_accuracy" in json.loads(capsys.readouterr().out)["base"]
    assert cli.main(["eval", there["model"], str(data), "--metric", "exact"]) == 1
    assert "without a prompt" in capsys.readouterr().err
