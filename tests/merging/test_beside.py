"""What lies beside the weights goes with them: config.json, licences, tokenizers, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_models import CONFIG, write_hf

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.own_tokenizer import tokenizer_for
from pylora.adapters.plan import resolve
from pylora.errors import FileFormatError, PlanError, UnsupportedError
from pylora.formats import open_checkpoint
from pylora.merging.merge import merge_checkpoint
from pylora.merging.unmerge import unmerge_checkpoint

KEPT = {
    "pad_token_id": 5,
    "initializer_range": 0.02,
    "use_cache": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "a_key_of_tomorrow": {"nested": [1, None]},
    "transformers_version": "5.24.0",
}


def vocabulary(folder: Path, tokens: list[str], template: str | None = None, **more: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(tokens)}
    Tokenizer(WordLevel(ids, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": tokens[1], **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)


def adapter(folder: Path, target: str | list[str] = "all-linear") -> Path:
    lora = LoraConfig(r=2, target_modules=target)
    Adapter.init(resolve(lora, CONFIG.modules()), lora).save(folder)
    return folder


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_every_key_of_config_json_is_carried_over(tmp_path: Path, key: str) -> None:
    write_hf(tmp_path / "base", dtype="bf16", settings=KEPT | {key: "bfloat16"})
    (tmp_path / "base" / "LICENSE.txt").write_text("mine")
    before = json.loads((tmp_path / "base" / "config.json").read_text())
    merge_checkpoint(tmp_path / "base", adapter(tmp_path / "a"), tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == before
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "mine"
    unmerge_checkpoint(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before


def test_what_the_merge_changes_is_said_in_config_json(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", settings=KEPT | {"dtype": "float32"})
    folder = adapter(tmp_path / "a", ["lm_head"])
    merge_checkpoint(tmp_path / "base", folder, tmp_path / "out", dtype="bf16")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after["tie_word_embeddings"] is False and after["dtype"] == "bfloat16"
    assert {key: after[key] for key in KEPT} == KEPT
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert not checkpoint.config.tie_word_embeddings


def test_an_adapters_own_template_and_tokenizer_are_used_and_carried_over(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    vocabulary(tmp_path / "base", ["<u>", "</s>", "a"], "base template")
    folder = adapter(tmp_path / "a")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        assert tokenizer_for(checkpoint, folder)[1] is None
        (folder / "chat_template.jinja").write_text("its own")
        tokenizer, note = tokenizer_for(checkpoint, folder)
        assert tokenizer.chat_template == "its own" and "own chat template is used" in str(note)
        vocabulary(folder, ["<u>", "</s>", "a", "<new>"], "its own")
        tokenizer, note = tokenizer_for(checkpoint, folder)
        assert tokenizer.encode("<new>") == [3] and "own tokenizer is used" in str(note)
    report = merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert "from the adapter: copied tokenizer.json" in report.tokenizer
    with open_checkpoint(tmp_path / "out") as merged:
        assert merged.tokenizer().encode("<new>") == [3]
        assert merged.tokenizer().chat_template == "its own"


def test_a_template_in_the_adapters_settings_alone_is_used_and_carried_over(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    vocabulary(tmp_path / "base", ["<u>", "</s>", "a"], "base template")
    (tmp_path / "base" / "chat_template.jinja").write_text("base template")
    folder = adapter(tmp_path / "a")
    settings = json.loads((tmp_path / "base" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "own"}))
    with open_checkpoint(tmp_path / "base") as checkpoint:
        tokenizer, note = tokenizer_for(checkpoint, folder)
    assert tokenizer.chat_template == "own" and "tokenizer_config.json" in str(note)
    merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as merged:
        assert merged.tokenizer().chat_template == "own"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<u>", "</s>", "b", "a"], "'a' has id 3, but the base model's tokenizer gives it 2"),
        (["<u>", "</s>", "a", *map(str, range(400))], "beyond the model's vocabulary of 300"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, tokens: list[str], message: str
) -> None:
    write_hf(tmp_path / "base")
    vocabulary(tmp_path / "base", ["<u>", "</s>", "a"])
    folder = adapter(tmp_path / "a")
    vocabulary(folder, tokens)
    with pytest.raises(PlanError, match=message):
        merge_checkpoint(tmp_path / "base", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stray_file_beside_an_index_does_not_win(tmp_path: Path) -> None:
    base = tmp_path / "base"
    stored = write_hf(base, shards=2)
    from pylora.formats.safetensors import save

    some = dict(list(stored.items())[:3])
    save(base / "model.safetensors", some)
    with open_checkpoint(base) as checkpoint:
        assert set(checkpoint.names()) == set(stored)
        assert "model.safetensors was passed over: it lacks" in checkpoint.notes[0]
    save(base / "model.safetensors", stored)
    with pytest.raises(FileFormatError, match="each with a whole model; take away the one"):
        open_checkpoint(base)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with open_checkpoint(base) as checkpoint:
        assert "index.json was passed over: it lacks" in checkpoint.notes[0]


def test_an_adapter_in_the_models_directory_is_said(tmp_path: Path) -> None:
    write_hf(tmp_path / "base")
    adapter(tmp_path / "base")
    with open_checkpoint(tmp_path / "base") as checkpoint:
        assert "holds an adapter beside the model" in checkpoint.notes[0]


def test_models_that_mlx_quantized_say_the_way_out(tmp_path: Path) -> None:
    write_hf(tmp_path / "base", settings={"quantization": {"group_size": 64, "bits": 4}})
    with pytest.raises(UnsupportedError, match="MLX quantized.*--dequantize"):
        open_checkpoint(tmp_path / "base")


def test_all_linear_is_saved_as_names(tmp_path: Path) -> None:
    saved = json.loads((adapter(tmp_path / "a") / "adapter_config.json").read_text())
    want = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert saved["target_modules"] == want
