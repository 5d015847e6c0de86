"""A file of settings: every value with its line, and what is wrong with it said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("yaml")

import typer

from pylora.commands import recipe
from pylora.commands.verbs import app
from pylora.errors import ConfigError

TRAIN: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]


def written(folder: Path, text: str, name: str = "run.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def read(folder: Path, text: str, name: str = "run.yaml") -> recipe.Recipe:
    return recipe.read(written(folder, text, name), TRAIN)


def test_settings_are_called_as_options_are(tmp_path: Path) -> None:
    text = """
# a comment
model: base.gguf
data: "2024"        # a text, as it is in quotes
lr: 1e-3
lora_alpha: 32
eval-data: v.jsonl
truncate: yes
max_seq_length: 0x40
targets: [q_proj, v_proj]
template_arg: {enable_thinking: false, name: text}
fields:
  prompt: question
steps: null
"""
    got = read(tmp_path, text.replace("0x40", "64"))
    assert got.values == {
        "model": "base.gguf",
        "data": "2024",
        "learning_rate": "0.001",
        "alpha": "32",
        "eval_data": "v.jsonl",
        "truncate": True,
        "max_length": "64",
        "targets": "q_proj,v_proj",
        "template_arg": ["enable_thinking=false", "name=text"],
        "fields": "prompt=question",
    }
    assert got.places["learning_rate"].endswith("run.yaml, line 5")


def test_json_is_the_same_and_needs_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "need", lambda name: pytest.fail(f"{name} was asked for"))
    text = '{\n "model": "m",\n "lr": 1e-3, "truncate": true,\n "targets": ["a", "b"]\n}\n'
    for name in ("run.json", "settings"):
        got = read(tmp_path, text, name)
        assert got.values["learning_rate"] == "0.001" and got.values["targets"] == "a,b"
        assert got.places["truncate"].endswith(f"{name}, line 3")


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("model: m\nlerning_rate: 3\n", 2, "no setting lerning_rate; did you mean learning_rate?"),
        ("epoch: 3", 1, "did you mean epochs?"),
        ("\n\nbatchsize: 3", 3, "did you mean batch-size?"),
        ("model_name_or_path: m", 1, "did you mean model?"),
        ("output_dir: m", 1, "did you mean out?"),
        ("per_device_train_batch_size: 2", 1, "whole update"),
        ("no_packing: true", 1, "write packing: false"),
        ("resume: true", 1, "resume is for the command line"),
        ("backend: numpy", 1, "pylora --backend NAME"),
        ("rank: eight", 1, "rank is the text 'eight'; it must be a whole number, such as 8"),
        ("rank: '16'", 1, "without quotes: 16"),
        ("rank: 8.5", 1, "it must be a whole number, such as 8"),
        ("rank: [8]", 1, "rank is a list; it must be a whole number"),
        ("rank: true", 1, "rank is true; it must be a whole number"),
        ("lr: fast", 1, "lr is the text 'fast'; it must be a number"),
        ("truncate: ture", 1, "truncate is the text 'ture'; it must be true"),
        ("truncate: 1", 1, "it must be true or false"),
        ("schedule: 5", 1, "schedule is 5; it must be a text"),
        ("out: 2024", 1, "put it in quotes"),
        ("targets: {a: b}", 1, "targets is a dict"),
        ("targets: [1, 2]", 1, "targets is a list"),
        ("lr: 1\nsteps: 3\nlearning_rate: 2", 3, "learning_rate was set already"),
        ("lr: 1\nlr: 2", 2, "lr was set already"),
        ("rank: [[[1]]]", 1, "a list of these"),
        ("- a\n- b", 1, "settings are expected"),
        ("just words", 1, "settings are expected"),
        ("rank: [1", 1, "not YAML"),
        ("a: b: c", 1, "not YAML"),
        ("? [a]\n: 3", 1, "is a word"),
        ("rank: *nobody", 1, "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert says in message and f"run.yaml, line {line}:" in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('{"lr": 1,\n "lr": 2}', 2, "lr was set already"),
        ('{"rank": "8"}', 1, "without quotes: 8"),
        ('{\n"rank" 8}', 2, "a colon after 'rank'"),
        ('{\n"rank":\n eight}', 3, "a value of rank, in JSON,"),
        ('{"rank": 8\n "lr": 1}', 2, "a comma after the value of rank"),
        ("{rank: 8}", 1, "in double quotes"),
        ('{"rank": 8} more', 1, "the end of the file"),
        ('{"rank": 8', 1, "a comma after"),
        ("[1]", 1, "a JSON object"),
        ("", 1, "a JSON object"),
        ('{"rank": ' + "[" * 100_000, 1, "a value of rank"),
        ('{"rnak": 8}', 1, "did you mean rank?"),
    ],
)
def test_json_that_is_wrong_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, "run.json")
    message = str(caught.value)
    assert says in message and f"run.json, line {line}:" in message


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path, "rank: " + "[" * 5000 + "]" * 5000)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("run.yaml", "r: 8", True),
        ("run.yml", "target_modules: [a]", True),
        ("settings", "lr: 3", True),
        ("a.json", json.dumps({"peft_type": "LORA", "r": 8, "lr": 3}), False),
        ("a.json", json.dumps({"r": 8, "target_modules": ["q_proj"]}), False),
        ("a.json", json.dumps({"r": 8, "model": "m"}), True),
        ("a.json", json.dumps({"learning-rate": 8}), True),
        ("a.json", '{"r": 8, "target_modules": oops', False),
        ("a.json", '{"lr": oops', True),
        ("a.json", "[1, 2]", True),
    ],
)
def test_recipes_and_adapter_configs_are_told_apart_by_what_is_in_them(
    tmp_path: Path, name: str, text: str, wanted: bool
) -> None:
    assert recipe.is_recipe(written(tmp_path, text, name), TRAIN) is wanted


def test_a_folder_is_an_adapters_and_a_missing_file_is_told_by_its_name(tmp_path: Path) -> None:
    assert not recipe.is_recipe(tmp_path, TRAIN)
    assert recipe.is_recipe(tmp_path / "gone.yaml", TRAIN)
    assert not recipe.is_recipe(tmp_path / "gone.json", TRAIN)
