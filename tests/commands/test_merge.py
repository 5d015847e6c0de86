"""Adapters with weights of their own, verb by verb: a vocabulary that was resized, a saved head."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("typer")
tokenizers = pytest.importorskip("tokenizers")

from tiny_model import write_tiny_model

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.peft import CONFIG, WEIGHTS
from pylora.adapters.plan import resolve
from pylora.commands import cli
from pylora.formats import open_checkpoint
from pylora.formats.safetensors import SafeTensors, save
from pylora.front.load import load
from pylora.model.llama import Llama

NEW = ("<|left|>", "<|right|>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return write_tiny_model(folder, tie_word_embeddings=True)


def with_tensors(model: Path, folder: Path, settings: dict[str, Any], tensors: Any) -> Path:
    """An adapter that does something, with more settings and tensors."""
    with open_checkpoint(model) as checkpoint:
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        Adapter.init(resolve(config, checkpoint.config.modules()), config, 1).save(folder)
    said = json.loads((folder / CONFIG).read_text()) | settings
    (folder / CONFIG).write_text(json.dumps(said))
    with SafeTensors(folder / WEIGHTS) as file:
        there = {k: np.array(file.load(k)) for k in file.tensors}
    save(folder / WEIGHTS, there | tensors, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def resized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokens more, in a tied table and in the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter") / "resized"
    with open_checkpoint(model) as checkpoint:
        table = np.array(checkpoint.load("model.embed_tokens.weight"))
    rng = np.random.default_rng(0)
    table = np.concatenate([table, rng.standard_normal((2, table.shape[1])).astype(np.float32)])
    tensors = {f"base_model.model.{n}.weight": table for n in ("model.embed_tokens", "lm_head")}
    with_tensors(model, folder, {}, tensors)
    own = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    own.add_special_tokens(list(NEW))
    own.save(str(folder / "tokenizer.json"))
    shutil.copy(model / "tokenizer_config.json", folder)
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.err if code else printed.out


def test_a_resized_vocabulary_goes_all_the_way(
    model: Path, resized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_checkpoint(model) as checkpoint:
        size = checkpoint.config.vocab_size
    prompt = f"truth {NEW[0]} exists {NEW[1]}"
    said = run(capsys, "generate", model, prompt, "-n", 8, "--adapter", resized)
    with load(model, resized) as loaded:
        assert loaded.config.vocab_size == size + 2
        ids = loaded.adapters.tokenizers["default"].encode(prompt)
        assert {size, size + 1} <= set(ids)
        assert loaded.generate(prompt, max_new_tokens=8).strip() == said.strip()
        logits, _ = loaded.llama.forward(ids)
        loaded.llama.attach(loaded.adapters["default"])
        logits, _ = loaded.llama.forward(ids)

    out = run(capsys, "merge", model, resized, tmp_path / "merged")
    assert "model.embed_tokens.weight replaced by the adapter's own" in out
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == size + 2 and config["tie_word_embeddings"] is True
    assert run(capsys, "generate", tmp_path / "merged", prompt, "-n", 8).strip() == said.strip()
    with open_checkpoint(tmp_path / "merged") as merged:
        assert merged.tokenizer().encode(prompt) == ids
        got, _ = Llama.from_checkpoint(merged).forward(ids)
    np.testing.assert_allclose(got, logits, rtol=0, atol=1e-4)
    run(capsys, "unmerge", tmp_path / "merged", tmp_path / "back")
    with open_checkpoint(model) as a, open_checkpoint(tmp_path / "back") as b:
        assert a.config == b.config
        assert all(np.array_equal(a.load(n), b.load(n)) for n in a.names())

    shown = run(capsys, "inspect", resized)
    assert f"in place of the base's: model.embed_tokens.weight, {size + 2} × " in shown
    assert "FAIL" not in run(capsys, "check", model, "--adapter", resized)
    for form in ("a.gguf", "mlx"):
        more = () if form == "a.gguf" else ("--to", "mlx")
        said = run(capsys, "convert", resized, tmp_path / form, "--base", model, *more, code=1)
        assert "'model.embed_tokens.weight' whole" in said and "pylora merge" in said
    said = run(capsys, "serve", model, "--adapter", f"it={resized}", "--port", 0, code=1)
    assert "vocabulary of its own" in said


def test_a_gguf_file_has_the_tables_and_the_tokens(
    model: Path, resized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(capsys, "merge", model, resized, "--to", tmp_path / "m.gguf", "--type", "f32")
    assert "model.embed_tokens.weight replaced" in out
    run(capsys, "merge", model, resized, tmp_path / "merged")
    ids = [5, 9, 2]
    with open_checkpoint(tmp_path / "m.gguf") as a, open_checkpoint(tmp_path / "merged") as b:
        assert a.config.vocab_size == b.config.vocab_size
        assert a.tokenizer().encode(NEW[0]) == b.tokenizer().encode(NEW[0])
        got = Llama.from_checkpoint(a).forward(ids)[0]
        np.testing.assert_allclose(got, Llama.from_checkpoint(b).forward(ids)[0], atol=1e-4)
    # Of a GGUF base, with and without a tokenizer beside the adapter.
    base = tmp_path / "base.gguf"
    plain = with_tensors(model, tmp_path / "plain", {}, {})
    run(capsys, "merge", model, plain, "--to", base, "--type", "f32")
    run(capsys, "merge", base, resized, "--to", tmp_path / "two.gguf")
    with open_checkpoint(tmp_path / "two.gguf") as two:
        assert two.config.vocab_size == two.shape("model.embed_tokens.weight")[0]
        assert len(two.tokenizer().encode(NEW[0])) == 1
    bare = tmp_path / "bare"
    shutil.copytree(resized, bare)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    said = run(capsys, "merge", base, bare, "--to", tmp_path / "three.gguf", code=1)
    assert "no tokenizer.json beside it" in said and not (tmp_path / "three.gguf").exists()


def test_whole_weights_are_not_summed_and_their_config_is_trained(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_checkpoint(model) as checkpoint:
        norm = np.array(checkpoint.load("model.norm.weight"))
    settings = {"modules_to_save": ["model.norm"]}
    one = with_tensors(
        model, tmp_path / "a", settings, {"base_model.model.model.norm.weight": norm}
    )
    said = run(capsys, "combine", one, one, tmp_path / "both", code=1)
    assert "cannot be summed" in said and not (tmp_path / "both").exists()
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    args = ("train", model, data, tmp_path / "run", "--steps", 1)
    run(capsys, *args, "--config", one / CONFIG)
    written = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert b'"base_model.model.model.norm.weight"' in written


@pytest.mark.parametrize("how", ["pissa", "olora", "eva"])
def test_a_beginning_is_trained_and_saved_as_a_plain_adapter(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    rows = ('{"prompt": "the sea is", "completion": " wide and deep today"}\n',) * 3
    data.write_text("".join(rows))
    args = ("train", model, data, tmp_path / "run", "--steps", 2, "-r", 2, "--init", how)
    run(capsys, *args, "--targets", "q_proj,down_proj")
    config = json.loads((tmp_path / "run" / "adapter" / CONFIG).read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == (2 if how == "eva" else 4) and config["lora_alpha"] == 2 * config["r"]
    assert "FAIL" not in run(capsys, "check", model, "--adapter", tmp_path / "run")
    said = run(capsys, *args[:-2], "--overwrite", "--init", "nothing", code=1)
    assert "not known" in said
