"""The C library on GGUF files whose tensors are fused or stacked, on adapters of such models, and
on files that an older exporter wrote: the bits are Python's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from c_families import IDS, LONG, OWN, SIZES, refused, same, write
from clibrary import CModel, greedy, needs_library, python_model

from pylora.adapters.adapter import Adapter
from pylora.adapters.convert import convert
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.formats.gguf_names import architecture, as_gguf, places
from pylora.formats.safetensors import SafeTensors, save
from pylora.model.config import LlamaConfig

pytestmark = needs_library

# model_type -> settings beside SIZES, and what the metadata say beside the common keys.
_MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "phi3": ({}, {"rope.dimension_count": 8}),
    "phi3-long": ({"head_dim": 16, "rope_scaling": {**LONG, "short_factor": [1.1] * 4,
                                                    "long_factor": [1.3, 2.0, 4.5, 9.1]},
                   "original_max_position_embeddings": 10, "partial_rotary_factor": 0.5},
                  {"rope.dimension_count": 8, "rope.scaling.original_context_length": 10,
                   "rope.scaling.attn_factor": 1.2, "attention.sliding_window": 3}),
    "gpt2": ({}, {}),
    "gpt_neox": ({"num_key_value_heads": 4, "head_dim": 16},
                 {"rope.dimension_count": 8, "use_parallel_residual": True}),
    "gpt_neox-serial": ({"num_key_value_heads": 4, "head_dim": 16, "attention_bias": False},
                        {"rope.dimension_count": 16, "use_parallel_residual": False}),
    "mixtral": ({"num_local_experts": 3}, {"expert_count": 3, "expert_used_count": 2}),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
                  {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}),
    "olmoe": ({"num_experts": 4, "num_experts_per_tok": 2},
              {"expert_count": 4, "expert_used_count": 2}),
}  # fmt: skip


def write_stacked(path: Path, case: str) -> LlamaConfig:
    """A GGUF file of random weights, experts stacked, with the rows of llama.cpp's converter."""
    kind, (settings, more) = case.split("-")[0], _MORE[case]
    own = OWN.get(kind, {})
    spelt = {"model_type": kind, **SIZES, **settings}
    spelt |= {k: spelt[common] for k, common in own.items() if common in spelt}
    if kind in ("gpt2", "phi3"):  # their heads are the width's
        spelt["head_dim"] = spelt["hidden_size"] // spelt["num_attention_heads"]
    if kind == "gpt2":
        spelt["num_key_value_heads"] = spelt["num_attention_heads"]
    config = LlamaConfig.from_hf(spelt)
    arch = architecture(config)
    writer = gguf.GGUFWriter(path, arch)
    eps = "layer_norm_epsilon" if config.norm == "layer" else "layer_norm_rms_epsilon"
    numbers = {
        "context_length": 64, "embedding_length": 64, "block_count": 4, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        f"attention.{eps}": 1e-6,
    } | more  # fmt: skip
    for key, value in numbers.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add = writer.add_bool if isinstance(value, bool) else add
        add(f"{arch}.{key}", value)
    if scaling := spelt.get("rope_scaling"):
        for name in ("short", "long"):
            factors = np.array(scaling[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", factors)
    rng, stacks = np.random.default_rng(3), dict[str, list[np.ndarray]]()
    shapes = config.tensors()
    for hf, (name, expert) in places(config).items():
        tensor = (rng.standard_normal(shapes[hf]) * 0.3 + 0.1).astype(np.float32)
        stacks.setdefault(name, []).append(as_gguf(tensor, hf.rpartition(".")[0], config))
        assert expert is None or expert == len(stacks[name]) - 1
        if expert is None or expert == config.experts - 1:
            whole = np.stack(stacks[name]) if expert is not None else stacks[name][0]
            writer.add_tensor(name, np.ascontiguousarray(whole))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return config


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize("case", list(_MORE))
def test_a_gguf_file_of_fused_and_stacked_tensors(
    tmp_path: Path, case: str, precision: str
) -> None:
    write_stacked(tmp_path / "m.gguf", case)
    same(tmp_path / "m.gguf", precision)


@pytest.mark.parametrize("case", ["phi3", "gpt2", "gpt_neox", "qwen3_moe", "mixtral"])
def test_adapters_of_fused_and_stacked_models(tmp_path: Path, case: str) -> None:
    """PEFT's and llama.cpp's, of every module that can take one."""
    config = write_stacked(tmp_path / "m.gguf", case)
    kind, rng = case.split("-")[0], np.random.default_rng(5)
    targets = sorted({p.rsplit(".", 1)[-1] for p, s in config.modules().items()
                      if s.kind == "linear" and p != config.names.head})  # fmt: skip
    lora = LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=kind == "gpt2")
    adapter = Adapter.init(resolve(lora, config.modules()), lora, seed=1)
    for one in adapter.values():
        one.B[...] = rng.standard_normal(one.B.shape) / 4
    adapter.save(tmp_path / "adapter")
    convert(tmp_path / "adapter", tmp_path / "adapter.gguf", tmp_path / "m.gguf")
    model = python_model(tmp_path / "m.gguf", "fp32")
    base = greedy(model, IDS, 4)[1]
    for path in (tmp_path / "adapter", tmp_path / "adapter.gguf"):
        model.attach(Adapter.load(path, model.config))
        tokens, logits = greedy(model, IDS, 4)
        with CModel(tmp_path / "m.gguf") as c:
            c.attach(path)
            assert [m for m, *_ in c.plan()] == list(adapter)
            got_tokens, got = c.generate(IDS, 4)
        assert got_tokens == tokens and got.tobytes() == logits.tobytes()
        assert got.tobytes() != base.tobytes()


def test_a_file_of_the_base_model_alone(tmp_path: Path) -> None:
    """GPT-2's own: without the prefix of the whole model, and with masks of older exporters."""
    write(tmp_path / "m", {"model_type": "gpt2"} | SIZES)
    with SafeTensors(tmp_path / "m" / "model.safetensors") as file:
        tensors = {n.removeprefix("transformer."): np.array(file.view(n)) for n in file.tensors}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(())
    save(tmp_path / "m" / "model.safetensors", tensors, {"format": "pt"})
    same(tmp_path / "m", "fp32")
    tensors["h.1.attn.scale"] = np.ones(1, np.float32)
    save(tmp_path / "m" / "model.safetensors", tensors, {"format": "pt"})
    assert "'h.1.attn.scale' is none of a gpt2 model" in refused(tmp_path / "m")


def test_stacked_experts_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_stacked(path, "qwen3_moe")
    whole = path.read_bytes()
    at = whole.index(b"qwen3moe.expert_count") + len(b"qwen3moe.expert_count") + 4
    for count in (0, 3, 5, 65536, 2**32 - 1):
        path.write_bytes(whole[:at] + count.to_bytes(4, "little") + whole[at + 4 :])
        assert re.search("expert", refused(path))
    path.write_bytes(whole.replace(b"blk.1.ffn_up_exps", b"blk.1.ffn_up_shex"))
    assert "blk.1.ffn_up_exps" in refused(path)
