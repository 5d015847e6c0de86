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
from c_families import LONG, SIZES, refused, same, write
from clibrary import needs_library
from small_models import REAL

from pylora.model.config import LlamaConfig

pytestmark = needs_library
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
    "llama": [
        {"rope_parameters": {**YARN, "rope_theta": 5e5}},
        {"max_position_embeddings": 10, "rope_scaling": {"type": "dynamic", "factor": 3.5}},
        {"rope_scaling": {**LONG, "original_max_position_embeddings": 10, "factor": 8.0}},
        {"rope_scaling": {**LONG, "attention_factor": 1.25}},
    ],
    "phi3": [
        {"head_dim": 16},
        {"head_dim": 64, "partial_rotary_factor": 0.5, "rope_scaling": LONG,
         "original_max_position_embeddings": 10, "num_key_value_heads": 4},
        {"rope_parameters": {**LONG, "type": "su", "rope_type": None, "rope_theta": 5e4},
         "original_max_position_embeddings": 10, "tie_word_embeddings": True},
        {"sliding_window": 3, "rope_scaling": {**LONG, "type": "yarn", "rope_type": None}},
    ],
    "gpt2": [
        {},
        {"scale_attn_weights": False, "activation_function": "gelu", "n_inner": 96},
        {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu2",
         "tie_word_embeddings": False},
    ],
    "gpt_neox": [
        {"num_key_value_heads": None},
        {"num_key_value_heads": None, "rotary_pct": 0.5, "use_parallel_residual": False,
         "hidden_act": "gelu_new", "rotary_emb_base": 500},
        {"num_key_value_heads": None, "attention_bias": False, "tie_word_embeddings": True,
         "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
    "mixtral": [
        {"num_local_experts": 3},
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 3,
         "layer_types": ["sliding_attention"] * 4},
    ],
    "qwen3_moe": [
        {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 32},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
         "norm_topk_prob": True, "mlp_only_layers": [1], "attention_bias": True,
         "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2},
        {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
    ],
    "olmoe": [
        {"num_experts": 4, "num_experts_per_tok": 2},
        {"num_experts": 3, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "attention_bias": True, "tie_word_embeddings": True},
    ],
}  # fmt: skip
CASES = [(name, i) for name, all_of in FAMILIES.items() for i in range(len(all_of))]


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


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"model_type": "cohere"}, "'cohere'.*gemma3_text.*olmoe"),
        ({"model_type": "phi3"}, "qkv_proj"),
        (
            {"model_type": "phi3", "rope_scaling": {**YARN, "rope_type": "linear"}},
            "linear.*longrope",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "short_factor.*16 numbers"),
        (
            {"model_type": "phi3", "rope_scaling": {**LONG, "long_factor": [1.0] * 15}},
            "long_factor",
        ),
        ({"model_type": "phi3", "rope_scaling": {**LONG, "long_factor": [0.0] * 16}}, "positive"),
        ({"model_type": "phi3", "rope_scaling": {**LONG, "mscale": 2.0}}, "mscale"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.1}, "3 numbers"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.01}, "partial_rotary_factor"),
        ({"model_type": "phi3", "partial_rotary_factor": 1e300}, "partial_rotary_factor"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "longrope", "factor": 2}},
            "short_factor",
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}, "factor"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 3}},
            "alpha",
        ),
        ({"model_type": "qwen3_moe"}, "128 experts in 4 layers"),
        ({"model_type": "qwen3_moe", "num_experts": 10**12}, "experts"),
        ({"model_type": "qwen3_moe", "num_experts": 65536}, "65536 experts"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 5}, "per_tok"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": {"a": 1}}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "shared_expert_intermediate_size": 8}, "shared_expert"),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
        ({"model_type": "mixtral", "layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"model_type": "gpt2", "n_positions": 8}, "wpe.weight|wte.weight"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "activation_function": "relu"}, "relu"),
        ({"model_type": "gpt_neox", "rotary_pct": 2.0}, "partial_rotary_factor"),
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
        (
            {"model_type": "olmo2", "rope_scaling": {"rope_type": "ntk", "factor": 2}},
            "ntk.*dynamic",
        ),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ({"model_type": "llama", "rope_scaling": {**YARN, "wavelength": 3}}, "wavelength"),
        ({"model_type": "llama", "rope_scaling": {**YARN, "beta_fast": 0}}, "beta_fast"),
        ({"model_type": "gpt_neox"}, "gpt_neox.embed_in"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], names: str) -> None:
    write(tmp_path / "m", {"model_type": "llama"} | SIZES)
    (tmp_path / "m" / "config.json").write_text(json.dumps(SIZES | settings))
    assert re.search(names, refused(tmp_path / "m"))
