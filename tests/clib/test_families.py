"""The C library's families: the settings of each mean what they mean in Python, to the last bit;
what C does not run is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from clibrary import CError, CModel, greedy, needs_library, python_model
from small_models import REAL

from pylora.formats.safetensors import save
from pylora.model.config import LlamaConfig

pytestmark = needs_library
IDS = [3, 17, 4, 29, 29, 8, 1, 30]
SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "gemma2": [
        {"sliding_window": 3, "query_pre_attn_scalar": 24},
        {"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": 2.0,
         "tie_word_embeddings": False, "attention_bias": True},
    ],
    "gemma3_text": [
        {"sliding_window": 3, "sliding_window_pattern": 2, "rope_local_base_freq": 5000.0},
        {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0,
                                                "rope_theta": 9e5},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 7e3}}},
        {"sliding_window": 3, "final_logit_softcapping": 3.0, "rope_scaling": LLAMA3},
    ],
    "granite": [
        {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.1,
         "logits_scaling": 8.0, "rope_theta": 5e5},
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
    ],
    "smollm3": [
        {},
        {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 3,
         "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"no_rope_layer_interval": 2},
    ],
    "olmo2": [{"rope_theta": 5e5}, {"attention_bias": True, "tie_word_embeddings": True}],
    "olmo3": [
        {"sliding_window": 3, "rope_scaling": YARN},
        {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2,
         "rope_parameters": {"full_attention": {**YARN, "rope_theta": 9e5},
                             "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    ],
    "gemma": [{"hidden_act": "gelu"}, {"attention_bias": True, "tie_word_embeddings": False}],
    "ministral": [
        {"sliding_window": 3, "layer_types": ["full_attention", "sliding_attention"] * 2},
        {"sliding_window": None}, {"sliding_window": 3},
    ],
    "seed_oss": [{}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}],
    "ernie4_5": [{}, {"use_bias": True, "rope_theta": 1e4, "tie_word_embeddings": False}],
    "qwen2": [
        {"rope_scaling": YARN},
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False,
                          "attention_factor": 1.25}},
        {"rope_scaling": {**YARN, "factor": None, "mscale": 0.7, "mscale_all_dim": 1.5},
         "original_max_position_embeddings": 16},
    ],
    "llama": [{"rope_parameters": {**YARN, "rope_theta": 5e5}}],
}  # fmt: skip
CASES = [(name, i) for name, all_of in FAMILIES.items() for i in range(len(all_of))]


def write(path: Path, settings: dict[str, Any]) -> None:
    """A directory of random weights for a config.json of these settings."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(7)
    shapes = LlamaConfig.from_hf(settings).tensors()
    save(
        path / "model.safetensors",
        {n: (rng.standard_normal(s) * 0.3).astype(np.float32) for n, s in shapes.items()},
        {"format": "pt"},
    )


def same(path: Path, precision: str) -> None:
    tokens, logits = greedy(python_model(path, precision), IDS, 4)
    with CModel(path, precision) as model:
        got_tokens, got = model.generate(IDS, 4)
    assert got_tokens == tokens
    assert got.tobytes() == logits.tobytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_directory(tmp_path: Path, name: str, case: int, precision: str) -> None:
    write(tmp_path / "m", {"model_type": name} | SIZES | FAMILIES[name][case])
    same(tmp_path / "m", precision)


_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
         "rope.scaling.original_context_length": 16}  # fmt: skip
_GGUF: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.sliding_window": 3, "attn_logit_softcapping": 30.0,
               "final_logit_softcapping": 20.0},
    "gemma3": {"attention.sliding_window": 3, "rope.freq_base_swa": 5000.0},
    "granite": {"attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.25,
                "logit_scale": 8.0},
    "smollm3": {},
    "olmo2": {},
    "olmo3": {"attention.sliding_window": 3, **_YARN},
    "gemma": {},
    "seed_oss": {},
    "ernie4_5": {},
    "qwen2": {**_YARN, "rope.scaling.yarn_beta_fast": 16.0},
}  # fmt: skip
_STEMS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", list(_GGUF))
def test_a_gguf_file(tmp_path: Path, arch: str, precision: str) -> None:
    name, arch = "gemma3_text" if arch == "gemma3" else arch, arch.replace("olmo3", "olmo2")
    config = LlamaConfig.from_hf({"model_type": name, "sliding_window": 3} | SIZES)
    plain = "pre_feedforward_layernorm" in config.names.mid_norm or arch in ("olmo2", "seed_oss")
    stems = _STEMS | {"post_attention_layernorm": "post_attention_norm" if plain else "ffn_norm"}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    numbers = {
        "context_length": 64, "embedding_length": 64, "block_count": 4, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 32,
        "attention.value_length": 32, "attention.layer_norm_rms_epsilon": 1e-6,
    } | _GGUF[name if name == "olmo3" else arch]  # fmt: skip
    for key, value in numbers.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add = writer.add_string if isinstance(value, str) else add
        add(f"{arch}.{key}", value)
    rng = np.random.default_rng(3)
    for tensor, shape in config.tensors().items():
        parts = tensor.split(".", 3)
        stem = parts[3].rsplit(".", 1)[0] if parts[1] == "layers" else tensor.rsplit(".", 1)[0]
        if parts[1] == "layers":
            named = f"blk.{parts[2]}.{stems[stem]}.weight"
        else:
            named = {"model.embed_tokens": "token_embd", "model.norm": "output_norm",
                     "lm_head": "output"}[stem] + ".weight"  # fmt: skip
        named = named.removesuffix("weight") + tensor.rsplit(".", 1)[1]
        writer.add_tensor(named, (rng.standard_normal(shape) * 0.3 + 0.5).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    same(tmp_path / "m.gguf", precision)


@pytest.mark.skipif(
    not (REAL.parent / "gemma-3-270m-q4_k_m.gguf").exists(), reason="needs the real Gemma 3 270M"
)
def test_the_real_gemma() -> None:
    same(REAL.parent / "gemma-3-270m-q4_k_m.gguf", "int4")


def refused(path: Path) -> str:
    with pytest.raises(CError) as caught, CModel(path):
        pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"model_type": "phi3"}, "phi3.*gemma3_text"),
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({"model_type": "llama", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"model_type": "llama", "embedding_multiplier": 2}, "embedding_multiplier"),
        ({"model_type": "llama", "num_local_experts": 8}, "num_local_experts"),
        ({"model_type": "mistral", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "granite", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "gelu"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"model_type": "gemma2", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1, 2, 1]}, "no_rope_layers"),
        ({"model_type": "smollm3", "no_rope_layers": [0]}, "no_rope_layers"),
        ({"model_type": "olmo2", "rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"model_type": "llama", "rope_scaling": {**YARN, "wavelength": 3}}, "wavelength"),
        ({"model_type": "llama", "rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast"),
        ({"model_type": "gpt_neox"}, "gpt_neox.*ernie4_5"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], names: str) -> None:
    write(tmp_path / "m", {"model_type": "llama"} | SIZES)
    (tmp_path / "m" / "config.json").write_text(json.dumps(SIZES | settings))
    assert re.search(names, refused(tmp_path / "m"))
