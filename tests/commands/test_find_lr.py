"""`pylora train --find-lr`: what it writes, what it says, and that a run can follow it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

from pylora.commands import cli


def test_tries_rates_and_a_run_can_follow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = write_tiny_model(tmp_path / "model"), tmp_path / "d.jsonl", tmp_path / "run"
    records = [{"prompt": f"{w} exists:", "completion": f" {w}"} for w in ("truth", "life", "time")]
    data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    args = ["train", str(model), str(data), str(out)]
    assert cli.main([*args, "--find-lr", "--steps", "30"]) == 0
    said = capsys.readouterr().out
    assert "trying rates from 1e-05 to 0.1 in 30 steps" in said and "--lr" in said
    lines = [json.loads(x) for x in (out / "find-lr.jsonl").read_text().splitlines()]
    assert lines[0]["learning_rate"] == pytest.approx(1e-5) and len(lines) > 12
    assert not (out / "adapter").exists()
    for more in (["--lr", "1e-3"], ["--epochs", "2"], ["--schedule", "linear"], ["--resume"]):
        assert cli.main([*args, "--find-lr", *more]) == 2
        assert "--find-lr" in capsys.readouterr().err
    assert cli.main([*args, "--steps", "1"]) == 0
    assert (out / "adapter").is_dir()
