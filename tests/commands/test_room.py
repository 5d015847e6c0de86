"""What is said of memory before a run, and what --fit does about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

import pylora
from pylora.commands import cli


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    where = tmp_path_factory.mktemp("there")
    model, data = write_tiny_model(where / "model"), where / "data.jsonl"
    words = " ".join(["truth", "life", "time"] * 36)
    records = [{"prompt": f"{words} exists:", "completion": " yes"}] * 16
    data.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(model), str(data)


@pytest.fixture(autouse=True)
def on_c() -> Iterator[None]:
    """The estimate is of the c backend, whatever other tests chose."""
    pylora.use("c")
    yield
    pylora.use(None)


def limited(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """As if there were so many bytes beside those that the process holds."""
    monkeypatch.setattr("pylora.training.memory.free_bytes", lambda: size)
    monkeypatch.setattr("pylora.training.memory.held_bytes", lambda: 1)


def test_a_run_that_has_room_says_what_it_takes(
    there: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *there, str(tmp_path / "run"), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "memory: about 0." in said and "note: there is room" not in said


def test_one_that_has_none_says_what_to_change_and_fit_changes_it(
    there: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from pylora.adapters.loraconfig import LoraConfig
    from pylora.adapters.plan import resolve
    from pylora.formats import open_checkpoint
    from pylora.training.config import TrainConfig
    from pylora.training.estimate import ways

    with open_checkpoint(there[0]) as checkpoint:
        lora = LoraConfig(r=8, target_modules="all-linear")
        plan = resolve(lora, checkpoint.config.modules())
        config = TrainConfig(batch_size=16)
        tried = ways(checkpoint, plan, "fp32", config, [118] * 16, 1)
    room = (tried[1].estimate.total + tried[2].estimate.total) / 2
    limited(monkeypatch, room / 0.95)
    args = ["train", *there, str(tmp_path / "run"), "--steps", "1", "--batch-size", "16"]
    assert cli.main(args) == 0  # it may do all the same
    said = capsys.readouterr().out
    assert "note: there is room for" in said and "--recompute --accumulation" in said
    assert cli.main([*args, "--fit", "--overwrite"]) == 0
    assert "--fit: --recompute, --accumulation" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["recompute"] is True and recorded["accumulation"] > 1
    assert not recorded.get("fit")
    again = ["train", "--resume", str(tmp_path / "run"), "--steps", "2"]
    monkeypatch.undo()
    assert cli.main(again) == 0, capsys.readouterr().err  # whatever memory there is now
    capsys.readouterr()
    limited(monkeypatch, 1000.0)
    assert cli.main([*args, "--fit", "--overwrite"]) == 1
    assert "the least is" in capsys.readouterr().err


def test_a_plan_says_it_too(
    there: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", there[0], "--length", "100"]) == 0
    assert "to train it on 8 examples of 100 tokens at a time, in fp32" in capsys.readouterr().out
    limited(monkeypatch, 1000.0)
    assert cli.main(["plan", there[0]]) == 0
    assert "note: there is room for 0.00 GB" in capsys.readouterr().out
    assert cli.main(["plan", there[0], "--length", "0"]) == 1


def test_records_beyond_the_positions_are_trained_with_a_warning(
    there: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "long.jsonl"
    words = " ".join(["truth", "life", "time"] * 60)  # the tiny model has 128 positions
    data.write_text(json.dumps({"prompt": words, "completion": " yes"}) + "\n", encoding="utf-8")
    args = ["train", there[0], str(data), str(tmp_path / "run"), "--recompute"]
    assert cli.main([*args, "--steps", "1"]) == 0
    assert "made for 128: the rotation goes on by its rule" in capsys.readouterr().err
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
