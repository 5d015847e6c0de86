"""--template-arg, notes of tokenizers, and ids that are no token, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer")
pytest.importorskip("tokenizers")

from small_models import CONFIG, add_tokenizer, write_gguf

from pylora.commands import cli
from pylora.commands.template import template_arguments
from pylora.errors import ConfigError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}{% if enable_thinking %}!{% endif %}{{ m.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant"
    "{% if enable_thinking %}!{% endif %}{% endif %}"
)


def test_values_are_json_or_text() -> None:
    given = ["a=false", "b=3", 'c=["x"]', "d=2026-11-30", "e=", "f=x=y"]
    assert template_arguments(given) == {
        "a": False, "b": 3, "c": ["x"], "d": "2026-11-30", "e": "", "f": "x=y",
    }  # fmt: skip
    for bad in (["a"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="--template-arg"):
            template_arguments(bad)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 ids, of which the tokenizer has 265: random weights choose the others, too."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"

    def more(writer: object) -> None:
        add_tokenizer(writer, template=TEMPLATE)  # type: ignore[arg-type]
        writer.add_uint32("tokenizer.ggml.padding_token_id", 4294967295)  # type: ignore[attr-defined]

    write_gguf(path, more=more)
    return path


def test_ids_without_a_token_end_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["-n", "50", "--temperature", "9", "--seed"]
    for seed in "123":
        assert cli.main(["generate", str(model), "hell", *hot, seed]) == 0
    assert "padding_token_id is 4294967295" in capsys.readouterr().err
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("he", "ll", "1")))
    assert cli.main(["generate", str(model), "--prompts", str(prompts), *hot, "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert CONFIG.vocab_size == 300


def test_an_argument_reaches_training_and_generation(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    talk = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "ll"}]
    data.write_text(json.dumps({"messages": talk}) + "\n")
    losses = []
    for value in ("false", "true"):
        out = tmp_path / value
        args = ["train", str(model), str(data), str(out), "--steps", "1", "--targets", "q_proj"]
        assert cli.main([*args, "--template-arg", f"enable_thinking={value}"]) == 0
        losses.append([json.loads(x) for x in (out / "log.jsonl").open()][-1]["loss"])
    assert losses[0] != losses[1]
    chat = ["generate", str(model), "he", "--chat", "-n", "3", "--template-arg"]
    capsys.readouterr()
    assert cli.main([*chat, "enable_thinking=true"]) == 0
    assert cli.main([*chat, "enable_thinkin=true"]) == 1
    assert "no argument 'enable_thinkin'" in capsys.readouterr().err
