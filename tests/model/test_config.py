"""The model's configuration, from and to Hugging Face's form, and the rotary tables made of it."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest

from pylora import backends
from pylora.errors import ConfigError, PyloraError, UnsupportedError
from pylora.model import families
from pylora.model.config import LlamaConfig, ModuleSpec
from pylora.model.rope import Rope, inverse_frequencies

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN3 = {"model_type": "qwen3", "qk_norm": True, "head_dim": 8}


# ---- configuration -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"rope_scaling": LLAMA3, "tie_word_embeddings": False, "eos_token_ids": (1, 2)},
        {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
        {"model_type": "mistral", "sliding_window": 5, "rope_theta": 1e6},
        {"model_type": "mistral", "bos_token_id": 3, "eos_token_ids": (4,)},
        {"model_type": "qwen2", "attention_bias": True},
        {
            "model_type": "qwen2",
            "attention_bias": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        QWEN3,
        {**QWEN3, "attention_bias": True, "attention_out_bias": True},
    ],
)
def test_a_config_survives_hugging_faces_form(over: dict[str, Any]) -> None:
    config = LlamaConfig.tiny(**over)
    assert LlamaConfig.from_hf(config.to_hf()) == config


BARE = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


def test_missing_keys_get_hugging_faces_defaults() -> None:
    llama = LlamaConfig.from_hf({"model_type": "llama", **BARE})
    assert (llama.num_key_value_heads, llama.bos_token_id, llama.eos_token_ids) == (32, 1, (2,))
    assert (llama.rope_theta, llama.rms_norm_eps, llama.tie_word_embeddings) == (1e4, 1e-6, False)
    mistral = LlamaConfig.from_hf({"model_type": "mistral", **BARE, "head_dim": 2})
    assert (mistral.num_key_value_heads, mistral.sliding_window) == (8, 4096)
    qwen2 = LlamaConfig.from_hf({"model_type": "qwen2", **BARE, "head_dim": 2})
    assert (qwen2.attention_bias, qwen2.attention_out_bias, qwen2.sliding_window) == (
        True,
        False,
        None,
    )
    qwen3 = LlamaConfig.from_hf({"model_type": "qwen3", **BARE})
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias) == (True, 128, False)


def test_both_spellings_of_rope_settings() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    new = {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}
    legacy = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    base = LlamaConfig.tiny().to_hf()
    for key in ("rope_theta", "rope_scaling"):
        del base[key]
    assert LlamaConfig.from_hf({**base, **old}) == LlamaConfig.from_hf({**base, **new})
    config = LlamaConfig.from_hf({**base, **legacy})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert LlamaConfig.from_hf({**base, **plain}).rope_scaling is None


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "mamba"),
        ({"model_type": None}, UnsupportedError, "None"),
        ({"hidden_act": "gelu"}, UnsupportedError, "gelu"),
        ({"quantization_config": {}}, UnsupportedError, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2}}, UnsupportedError, "spiral"),
        ({"rope_scaling": {"rope_type": "linear"}}, ConfigError, "factor"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, ConfigError, "low_freq_factor"),
        ({"rope_scaling": {"full_attention": {}}}, UnsupportedError, "per layer"),
        ({"layer_types": ["sliding_attention"] * 2}, UnsupportedError, "layer_types"),
        ({"hidden_size": -1}, ConfigError, "hidden_size"),
        ({"hidden_size": 10**12}, ConfigError, "hidden_size"),
        ({"num_hidden_layers": 10**6}, ConfigError, "num_hidden_layers"),
        ({"num_attention_heads": 0}, ConfigError, "num_attention_heads"),
        ({"vocab_size": True}, ConfigError, "vocab_size"),
        ({"vocab_size": "61"}, ConfigError, "vocab_size"),
        ({"num_key_value_heads": 3}, ConfigError, "multiple"),
        ({"head_dim": 5}, ConfigError, "even"),
        ({"rms_norm_eps": 0.0}, ConfigError, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, ConfigError, "rope_theta"),
        ({"rope_theta": 10**400}, ConfigError, "rope_theta"),
        ({"rms_norm_eps": 10**400}, ConfigError, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, ConfigError, "tie_word_embeddings"),
        ({"eos_token_id": 61}, ConfigError, "eos_token_ids"),
        ({"eos_token_id": ["2"]}, ConfigError, "eos_token_ids"),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused(
    change: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LlamaConfig.from_hf({**LlamaConfig.tiny().to_hf(), **change})


def test_a_missing_key_and_an_unknown_field_are_named() -> None:
    config = LlamaConfig.tiny().to_hf()
    del config["vocab_size"]
    with pytest.raises(ConfigError, match="vocab_size"):
        LlamaConfig.from_hf(config)
    with pytest.raises(ConfigError, match="no field hiden_size"):
        LlamaConfig.tiny(hiden_size=3)
    with pytest.raises(UnsupportedError, match="attention_out_bias"):
        LlamaConfig.tiny(attention_bias=True).to_hf()


def test_tensors_and_modules() -> None:
    config = LlamaConfig.tiny(**QWEN3, tie_word_embeddings=False, num_hidden_layers=1)
    layer = "model.layers.0"
    assert config.tensors() == {
        "model.embed_tokens.weight": (61, 24),
        f"{layer}.input_layernorm.weight": (24,),
        f"{layer}.self_attn.q_norm.weight": (8,),
        f"{layer}.self_attn.k_norm.weight": (8,),
        f"{layer}.self_attn.q_proj.weight": (32, 24),
        f"{layer}.self_attn.k_proj.weight": (16, 24),
        f"{layer}.self_attn.v_proj.weight": (16, 24),
        f"{layer}.self_attn.o_proj.weight": (24, 32),
        f"{layer}.post_attention_layernorm.weight": (24,),
        f"{layer}.mlp.gate_proj.weight": (40, 24),
        f"{layer}.mlp.up_proj.weight": (40, 24),
        f"{layer}.mlp.down_proj.weight": (24, 40),
        "model.norm.weight": (24,),
        "lm_head.weight": (61, 24),
    }
    assert config.modules()["model.embed_tokens"] == ModuleSpec("embedding", 24, 61)
    assert config.modules()["lm_head"] == ModuleSpec("linear", 61, 24)
    assert config.num_parameters == sum(math.prod(s) for s in config.tensors().values())
    biased = {n for n in LlamaConfig.tiny(attention_bias=True).tensors() if n.endswith(".bias")}
    assert biased == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qkv"}
    assert "lm_head.weight" not in LlamaConfig.tiny().tensors()


# ---- rotary tables -----------------------------------------------------------------------------


def test_llama3_frequencies_follow_the_wavelengths() -> None:
    plain = inverse_frequencies(16, 1e4)
    for got, f in zip(inverse_frequencies(16, 1e4, LLAMA3), plain, strict=True):
        wavelength = 2 * math.pi / f
        if wavelength < 32 / 4:
            want = f
        elif wavelength > 32 / 1:
            want = f / 8
        else:
            smooth = (32 / wavelength - 1) / (4 - 1)
            want = (1 - smooth) * f / 8 + smooth * f
        assert got == pytest.approx(want, rel=1e-14)
    assert plain[0] == 1 and plain[1] == pytest.approx(1e4 ** (-2 / 16))
    np.testing.assert_array_equal(
        inverse_frequencies(16, 1e4, {"rope_type": "linear", "factor": 4.0}), plain / 4
    )


def test_the_tables_grow_without_changing() -> None:
    rope = Rope(LlamaConfig.tiny(max_position_embeddings=1000), ops=backends.get("numpy"))
    first = [t.copy() for t in rope.tables(1)]
    for few, many in zip(first, rope.tables(700), strict=True):
        assert many.shape[0] >= 700 and many.dtype == np.float32
        np.testing.assert_array_equal(few, many[: few.shape[0]])
    assert rope.tables(1000)[0].shape == (1000, 3)
    with pytest.raises(ConfigError, match=r"1001 tokens.*\(1000\)"):
        rope.tables(1001)


def test_ministral_3_is_read_up_to_where_its_queries_grow() -> None:
    """Behind the original length they are multiplied by their position's logarithm, which is not
    carried out: a longer sequence is refused."""
    config = LlamaConfig.from_hf({"text_config": {"model_type": "ministral3"}})
    assert (config.max_position_embeddings, config.max_positions) == (262144, 16384)
    assert config.rope_scaling is not None and config.rope_scaling["rope_type"] == "yarn"
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 8}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    part = {"model_type": "ministral3", **tiny, "rope_parameters": yarn}
    assert LlamaConfig.from_hf({"text_config": part}).max_positions == 262144
    yarn["llama_4_scaling_beta"] = 0.1
    config = LlamaConfig.from_hf({"text_config": part})
    with pytest.raises(ConfigError, match="17 tokens.*shorten"):
        Rope(config, ops=backends.get("numpy")).tables(17)
    yarn["type"] = "linear"
    with pytest.raises(UnsupportedError, match="llama_4_scaling_beta without YaRN"):
        LlamaConfig.from_hf({"text_config": part})


# Values that a damaged file, or an odd one, may have: each is read or refused with a sentence.
ODD: dict[str, list[Any]] = {
    "rope_scaling": [[], [1], "yarn", {"type": 5}, {"type": "yarn", "factor": ""}],
    "rope_parameters": [None, [], 7, {"full_attention": 3}, {"full_attention": {"rope_type": "x"}}],
    "rope_theta": ["x", 0, -1],
    "layer_types": ["full_attention", [], [None, None], ["full_attention"], [["a"], "b"]],
    "sliding_window": ["4", 0, -3, 2.5, True],
    "head_dim": [0, None, 7, "8"],
    "num_attention_heads": [0, 3],
    "num_key_value_heads": [None, 3, 0],
    "hidden_act": [5, None, "swiglu"],
    "hidden_activation": [[]],
    "tie_word_embeddings": ["yes", None],
    "attention_bias": [1],
    "mlp_bias": ["x"],
    "eos_token_id": [[1, "a"], True, 1000.0, [], 61],
    "bos_token_id": [-1],
    "rms_norm_eps": [0, None, "1e-5"],
    "layer_norm_eps": [None],
    "norm_epsilon": [None],
    "partial_rotary_factor": [0, 1.5, "x", None],
    "max_position_embeddings": [None, 0, "x"],
    "num_experts": [0, None, "4"],
    "num_local_experts": [[]],
    "num_experts_per_tok": [None, 0],
    "moe_intermediate_size": [None],
    "mlp_only_layers": [None, 3, ["a"]],
    "decoder_sparse_step": [0],
    "norm_topk_prob": [None],
    "quantization_config": [{"bits": 4}],
    "text_config": [None, {}, {"model_type": "qwen3_5_text"}, []],
    "query_pre_attn_scalar": [None, 0, "x"],
    "attn_logit_softcapping": [0, -1],
    "final_logit_softcapping": ["x"],
    "sliding_window_pattern": [0, None, "LLG", "XY"],
    "logit_scale": [0, None],
    "logits_scaling": [0],
    "embedding_multiplier": [None],
    "no_rope_layers": [[], [0, 2], None],
    "no_rope_layer_interval": [0],
    "n_inner": [None],
    "n_embd": [None],
    "use_sliding_window": ["x"],
    "max_window_layers": [None, -1],
    "rotary_pct": [None, 2],
    "rotary_emb_base": [None],
    "original_max_position_embeddings": ["x", 0],
    "vocab_size": [None],
    "hidden_size": [None],
    "num_hidden_layers": [None, 1000000000, True],
    "use_parallel_residual": [None],
    "qk_layernorm": [None],
    "shared_intermediate_size": [None, "x"],
    "position_embedding_type": [5],
    "layers_block_type": [["attention", "attention"]],
    "use_qk_norm": [None],
    "scale_attn_by_inverse_layer_idx": [None],
    "scale_attn_weights": [None],
    "model_type": [None, ["llama"], {}],
    "rope_local_base_freq": [None, "x"],
    "intermediate_size": [None, [20]],
}  # fmt: skip


@pytest.mark.parametrize("kind", [*families.ALL, *families.ALSO])
def test_no_value_of_a_setting_breaks_the_reader(kind: str) -> None:
    sizes = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    for name, values in ODD.items():
        for value in values:
            settings = {**sizes, "model_type": kind, name: value}
            for config in (settings, {"model_type": "whole", "text_config": settings}):
                with contextlib.suppress(PyloraError):
                    LlamaConfig.from_hf(config)
