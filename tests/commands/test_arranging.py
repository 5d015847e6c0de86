"""Settings from the command line, a file and the run itself; what is typed comes first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")
pytest.importorskip("yaml")

import typer
from tiny_model import DATA, write_tiny_model

from pylora.commands import cli, recipe
from pylora.commands.verbs import app

TRAIN: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("there")
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for name, some in (("data", lines[:16]), ("eval", lines[16:20])):
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
    model = write_tiny_model(folder / "model")
    return {
        "model": str(model), "data": str(folder / "data.jsonl"), "eval": str(folder / "eval.jsonl")
    }  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert cli.main([str(a) for a in args]) == code, capsys.readouterr().err
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return said.out, said.err

    return call


def recorded(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return found


def written(folder: Path, there: dict[str, str], **more: Any) -> Path:
    file = folder / "run.yaml"
    values = {"model": there["model"], "data": there["data"], "out": str(folder / "run"), **more}
    file.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    return file


def test_a_file_is_a_command_line_and_what_is_typed_comes_first(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    file = written(tmp_path, there, lr=0.02, epochs=3, targets=["q_proj"], rank=4)
    run("train", "--config", file, "--steps", 3, "--rank", 2)
    got = recorded(tmp_path / "run")
    assert (got["lr"], got["steps"], got["rank"], got["targets"]) == (0.02, 3, 2, "q_proj")
    assert "epochs" not in got, "--steps stands in their place"
    typed = ("train", there["model"], there["data"], tmp_path / "typed", "--lr", 0.02)
    run(*typed, "--steps", 3, "--rank", 2, "--targets", "q_proj")
    # The run's own file makes the same run again.
    run(
        "train",
        "--config",
        tmp_path / "run/run.json",
        there["model"],
        there["data"],
        tmp_path / "c",
    )
    arrays = [
        (tmp_path / name / "adapter/adapter_model.safetensors").read_bytes()
        for name in ("run", "typed", "c")
    ]
    assert arrays[0] == arrays[1] == arrays[2]


def test_the_arguments_that_the_file_lacks_are_typed(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {there['model']}\nsteps: 1\nout: {tmp_path / 'out'}\n")
    run("train", "--config", file, there["data"])
    assert (tmp_path / "out/adapter").is_dir()
    _, err = run("train", "--config", file, there["data"], tmp_path / "b", code=2)
    assert "MODEL and OUT already; of the arguments give DATA, or all three" in err
    _, err = run("train", "--config", file, code=2)
    assert "DATA is missing" in err


@pytest.mark.parametrize(
    ("more", "line", "says"),
    [
        ({"lerning_rate": 3}, 4, "did you mean learning_rate?"),
        ({"rank": "eight"}, 4, "must be a whole number"),
        ({"schedule": "cosin"}, 4, "did you mean cosine?"),
        ({"steps": 2, "warmup": -1}, 5, "warmup_steps is -1"),
        ({"lr": -1}, 4, "above 0"),
        ({"precision": "bf17"}, 4, "precision"),
    ],
)
def test_what_is_wrong_in_the_file_is_named_with_its_line(
    there: dict[str, str], tmp_path: Path, run: Any, more: Any, line: int, says: str
) -> None:
    file = written(tmp_path, there, **more)
    _, err = run("train", "--config", file, code=1)
    assert says in err and f"run.yaml, line {line}: " in err and err.count("\n") == 1


def test_settings_that_contradict_each_other_in_the_file_are_refused(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    _, err = run("train", "--config", written(tmp_path, there, steps=2, epochs=2), code=2)
    assert "--steps cannot be used with --epochs" in err
    _, err = run("train", "--config", written(tmp_path, there, eval_every=2), code=2)
    assert "--eval-every needs --eval" in err


def test_pefts_file_is_still_taken(there: dict[str, str], tmp_path: Path, run: Any) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"r": 3, "target_modules": ["q_proj"]}')
    for option in ("--config", "--adapter-config"):
        out = tmp_path / option
        run("train", there["model"], there["data"], out, "--steps", 1, option, file)
        assert json.loads((out / "adapter/adapter_config.json").read_text())["r"] == 3
    args = ("train", there["model"], there["data"], tmp_path / "x")
    _, err = run(*args, "--config", file, "--rank", 2, code=2)
    assert "--rank cannot be used with --adapter-config" in err
    recipe_ = written(tmp_path, there, adapter_config=str(file), steps=1)
    run("train", "--config", recipe_)
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["r"] == 3


def test_resume_needs_the_folder_alone_and_may_go_on(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "run"
    whole = ("train", there["model"], there["data"], tmp_path / "whole", "--schedule", "constant")
    run(*whole, "--steps", 6, "--rank", 3, "--lr", 0.02)
    start = ("train", there["model"], there["data"], out, "--schedule", "constant")
    run(*start, "--steps", 4, "--rank", 3, "--lr", 0.02)
    before = (out / "run.json").read_bytes()
    run("train", "--resume", out)
    assert (out / "run.json").read_bytes() == before
    run("train", "--resume", out, "--steps", 6)
    assert recorded(out)["steps"] == 6
    arrays = [
        (where / "adapter/adapter_model.safetensors").read_bytes()
        for where in (out, tmp_path / "whole")
    ]
    assert arrays[0] == arrays[1]
    run("train", "--resume", out, "--epochs", 4)
    assert recorded(out)["epochs"] == 4 and "steps" not in recorded(out)
    assert (out / "checkpoint-000008").is_dir()
    kept = (out / "run.json").read_bytes()
    _, err = run("train", "--resume", out, "--lr", 0.5, code=1)
    assert "learning_rate was 0.02 and is 0.5" in err
    _, err = run("train", "--resume", out, "--batch-size", 4, "--steps", 30, code=1)
    assert "batch_size was 8 and is 4" in err
    assert (out / "run.json").read_bytes() == kept, "a refused change is not written down"


def test_nothing_to_resume(tmp_path: Path, there: dict[str, str], run: Any) -> None:
    _, err = run("train", "--resume", tmp_path / "gone", code=1)
    assert "no such directory to resume from" in err
    _, err = run("train", "--resume", tmp_path, code=1)
    assert "has no run.json" in err and "give MODEL DATA OUT" in err


def test_the_example_is_what_it_says(tmp_path: Path, run: Any) -> None:
    out, _ = run("train", "--print-config")
    file = tmp_path / "example.yaml"
    file.write_text(out, encoding="utf-8")
    values = recipe.read(file, TRAIN).values
    assert values["rank"] == "8" and "learning_rate" not in values and "model" not in values
    for param in recipe.settings(TRAIN):
        assert f"{recipe.name_of(param)}:" in out and (param.help or "")[:20] in out
    out, _ = run("train", "--print-config", "--lr", "2e-4", "--config", file)
    file.write_text(out, encoding="utf-8")
    assert recipe.read(file, TRAIN).values == values | {"learning_rate": "0.0002"}


def test_a_short_run_is_said_to_be_one(there: dict[str, str], tmp_path: Path, run: Any) -> None:
    args = ("train", there["model"], there["data"], tmp_path / "run")
    out, err = run(*args, "--epochs", 1)
    assert "note: 2 steps: likely undertrained" in out
    out, err = run(*args, "--overwrite")
    assert "60 steps, 30 epochs; rate 0.002" in out and "undertrained" not in out


def test_evaluations_are_shown_and_the_best_is_kept(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    metric = tmp_path / "mine.py"
    metric.write_text("def length(answer, expected):\n    return len(answer)\n")
    out = tmp_path / "run"
    shown, _ = run(
        "train", there["model"], there["data"], out, "--steps", 12, "--lr", 0.5, "--eval",
        there["eval"], "--eval-every", 2, "--metric", "exact", "--metric", f"{metric}:length",
        "--metric", "token-accuracy", "--sample", "truth exists →", "--patience", 2,
    )  # fmt: skip
    assert "evaluation before training: loss" in shown and "evaluation after 2 steps" in shown
    assert "truth exists → → " in shown and ", length " in shown and "exact match" in shown
    lines = [json.loads(line) for line in (out / "log.jsonl").open()]
    seen = [line for line in lines if "eval_loss" in line]
    assert seen[0]["step"] == 0 and {"eval_exact_match", "eval_length"} <= set(seen[0])
    assert seen[0]["samples"][0]["prompt"] == "truth exists →"
    best = min(seen[1:], key=lambda line: float(line["eval_loss"]))["step"]
    done = max(line["step"] for line in lines)
    assert best == done or f"that of step {best}, the best by evaluation" in shown
    assert done == 12 or "the evaluation got no better" in shown
    kept = [out / f"{name}/adapter_model.safetensors" for name in ("adapter", f"best-{best:06d}")]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_a_run_starts_from_an_adapter_and_has_a_card(
    there: dict[str, str], tmp_path: Path, run: Any
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    start = ("train", there["model"], there["data"])
    run(*start, first, "--steps", 30, "--lr", 0.02, "--rank", 3)
    shown, _ = run(*start, second, "--steps", 2, "--lr", 1e-3, "--from", first)
    losses = [
        [json.loads(line)["loss"] for line in (out / "log.jsonl").open()] for out in (first, second)
    ]
    assert losses[1][0] < losses[0][0] - 0.5, "it goes on where the first one ended"
    assert json.loads((second / "adapter/adapter_config.json").read_text())["r"] == 3
    _, err = run(*start, tmp_path / "x", "--from", first, "--rank", 2, code=2)
    assert "--rank cannot be used with --from" in err
    run("train", "--resume", second, "--steps", 3)
    for folder in (second, second / "adapter"):
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "library_name: peft" in text and "16 records" in text and "3 steps" in text
