"""`pylora train --objective …`: each from a file to an adapter, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from pylora.commands.cli import main
from pylora.training.checkpoint import checkpoints
from pylora.training.objectives.reference import FILE

PROMPTS = ("time equals", "all is", "nothing is", "truth leads to")
PAIRS = [
    {"prompt": p, "chosen": " truth", "rejected": " change"}
    for p in PROMPTS
]  # fmt: skip
DATA: dict[str, list[dict[str, Any]]] = {
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo"), PAIRS),
    "kto": [
        {"prompt": p, "completion": " truth", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)
    ],
    "classify": [{"text": p, "label": i % 2} for i, p in enumerate(PROMPTS)],
    "regress": [{"text": p, "label": i / 2} for i, p in enumerate(PROMPTS)],
    "distill": [{"prompt": p, "completion": " truth"} for p in PROMPTS],
}
JUDGED = {
    **dict.fromkeys(("dpo", "ipo", "simpo", "orpo", "kto"), "accuracy"),
    "classify": "macro_f1",
    "regress": "rmse",
    "distill": "agreement",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("objectives") / "model")


def written(folder: Path, records: list[dict[str, Any]]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


@pytest.mark.parametrize("name", list(DATA))
def test_from_a_file_to_an_adapter(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = written(tmp_path, DATA[name])
    words: list[Any] = ["train", model, data, tmp_path / "out", "--objective", name]
    words += ["--eval", data, "--steps", 3, "--lr", 0.01, "-r", 2]
    words += ["--teacher", model] if name == "distill" else []
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert f"{JUDGED[name].replace(chr(95), chr(32))} " in said and "perplexity" not in said
    (last,) = (
        record
        for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()
        if "eval_loss" in (record := json.loads(line)) and record["step"] == 3
    )
    assert f"eval_{JUDGED[name]}" in last and last["eval_perplexity"] is None
    assert (tmp_path / "out" / FILE).exists() == (name in ("dpo", "ipo", "kto"))
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    headed = name in ("classify", "regress")
    assert settings["task_type"] == ("SEQ_CLS" if headed else "CAUSAL_LM")
    assert len(checkpoints(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    "name, more, message",
    [
        ("kot", [], "did you mean 'kto'?"),
        ("dpo", ["--gamma", "1"], "gamma is no setting of the objective dpo"),
        ("simpo", ["--beta", "-1"], "beta is -1; it must be above 0"),
        ("distill", [], "needs --teacher MODEL, or --teacher-adapter"),
        ("dpo", ["--teacher", "x"], "--teacher needs --objective: it is for distill"),
        ("dpo", ["--classes", "2"], "--classes needs --objective: it is for classify"),
        ("sft", [], "data.jsonl:1: the field 'chosen' is for another objective"),
        ("classify", [], "data.jsonl:1: a record has 'text' and 'label', this one has 'prompt'"),
        ("kto", [], "one answer alone"),
    ],
)
def test_what_is_refused(
    name: str, more: list[str], message: str, model: Path, tmp_path: Path, capsys: Any
) -> None:
    records = [{"prompt": "a", "completion": "b", "label": True}] if name == "kto" else PAIRS
    data = written(tmp_path, records)
    words = ["train", str(model), str(data), str(tmp_path / "out"), "--objective", name, *more]
    assert main(words) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
