"""Hugging Face directories: whole and sharded, every dtype, and each way in which one is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import CONFIG, weights, write_gguf, write_hf

from pylora.errors import FileFormatError, PyloraError, UnsupportedError
from pylora.formats import open_checkpoint, widen
from pylora.formats.safetensors import save
from pylora.model.config import LlamaConfig

TINY = LlamaConfig.tiny()
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_tensor_comes_back(tmp_path: Path, dtype: str, shards: int) -> None:
    stored = write_hf(tmp_path, TINY, dtype, shards=shards)
    with open_checkpoint(tmp_path) as model:
        assert model.config == TINY and list(model.names()) == list(TINY.tensors())
        for name, a in stored.items():
            raw, kind = model.raw(name)
            assert kind == dtype == model.dtype(name) and raw.dtype == a.dtype
            assert np.array_equal(raw, a)
            assert model.load(name).dtype == np.float32
            assert np.array_equal(model.load(name), widen(a, dtype))
            assert model.shape(name) == TINY.tensors()[name]
    with pytest.raises(FileFormatError):
        model.load("model.norm.weight")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_model_type(tmp_path: Path, kind: str) -> None:
    extra = {"qwen2": {"attention_bias": True}, "qwen3": {"qk_norm": True}}.get(kind, {})
    config = LlamaConfig.tiny(model_type=kind, tie_word_embeddings=False, **extra)
    write_hf(tmp_path, config)
    assert open_checkpoint(tmp_path).config == config


def test_a_directory_is_read_as_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileFormatError, match="no GGUF file"):
        open_checkpoint(tmp_path)
    write_gguf(tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).config == CONFIG
    write_gguf(tmp_path / "b.gguf")
    with pytest.raises(FileFormatError, match="2 GGUF files"):
        open_checkpoint(tmp_path)
    save(tmp_path / "x.safetensors", {})
    with pytest.raises(FileFormatError, match="give the directory"):
        open_checkpoint(tmp_path / "x.safetensors")


def test_left_overs_of_old_exporters_are_known(tmp_path: Path) -> None:
    tensors = weights(TINY)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_hf(tmp_path, TINY, tensors=tensors)
    assert list(open_checkpoint(tmp_path).names()) == list(TINY.tensors())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    write_hf(tmp_path, TINY, tensors=tensors)
    with pytest.raises(FileFormatError, match=r"tie_word_embeddings.*lm_head\.weight"):
        open_checkpoint(tmp_path)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    tensors = weights(TINY)
    del tensors["model.norm.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    write_hf(tmp_path, TINY, tensors=tensors)
    with pytest.raises(
        FileFormatError, match=r"missing.*model\.norm\.weight.*unexpected.*layers\.7"
    ):
        open_checkpoint(tmp_path)
    tensors = weights(TINY) | {"model.norm.weight": np.zeros(7, np.float32)}
    write_hf(tmp_path, TINY, tensors=tensors)
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight.*\(7,\).*\(24,\)"):
        open_checkpoint(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    write_hf(tmp_path, TINY)
    tensors = weights(TINY) | {"model.norm.weight": np.zeros(24, np.int64)}
    save(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight.*I64"):
        open_checkpoint(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    write_hf(tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match=r"pytorch_model\.bin is a pickle"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 9_999},
        {"num_hidden_layers": "2"},
        {"hidden_size": 2**40},
        {"vocab_size": 2**31 - 1},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 3},
        {"head_dim": -6},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": "x"},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": 3},
        {"model_type": "bert"},
        {"model_type": ["llama"]},
        {"bos_token_id": 10**9},
        {"eos_token_id": {"a": 1}},
        {"tie_word_embeddings": "no"},
        {"quantization_config": {"bits": 4}},
    ],
)
def test_a_broken_configuration_is_an_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_hf(tmp_path, TINY, settings=settings)
    with pytest.raises(PyloraError, match=next(iter(settings)) + "|layers|shape|heads|rope"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update({"model.norm.weight": "../outside.safetensors"}), "same directory"),
        (lambda m: m.update({"model.norm.weight": "/etc/passwd"}), "same directory"),
        (lambda m: m.update({"model.norm.weight": "C:evil.safetensors"}), "same directory"),
        (lambda m: m.update({"model.norm.weight": "..\\x.safetensors"}), "same directory"),
        (lambda m: m.update({"model.norm.weight": 7}), "same directory"),
        (lambda m: m.update({"model.norm.weight": "no.safetensors"}), "no such file"),
        (lambda m: m.update({"phantom": m["model.norm.weight"]}), "phantom"),
        (lambda m: m.pop("model.norm.weight"), r"model\.norm\.weight.*not listed"),
        (lambda m: m.clear(), "weight_map"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, change: Any, message: str) -> None:
    save(tmp_path / "outside.safetensors", {"model.norm.weight": np.ones(24, np.float32)})
    directory = tmp_path / "model"
    write_hf(directory, TINY, shards=2)
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=message):
        open_checkpoint(directory)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    write_hf(tmp_path, TINY, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shard = next(s for s in index.values() if s != index["model.norm.weight"])
    names = [n for n, s in index.items() if s == shard]
    tensors = {n: w for n, w in weights(TINY).items() if n in (*names, "model.norm.weight")}
    save(tmp_path / shard, tensors)
    with pytest.raises(FileFormatError, match=r"model\.norm\.weight.*not listed"):
        open_checkpoint(tmp_path)


@pytest.mark.parity
def test_transformers_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, tie_word_embeddings=False)
    stored = write_hf(tmp_path / "ours", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="float32")
    state = model.state_dict()
    assert set(state) == set(stored)
    assert all(np.array_equal(state[name].numpy(), a) for name, a in stored.items())
    model.save_pretrained(tmp_path / "theirs")
    again = open_checkpoint(tmp_path / "theirs")
    assert all(np.array_equal(again.load(name), a) for name, a in stored.items())
    assert again.config == config
