"""Mixtures of experts: Mixtral, Qwen3 MoE, OLMoE."""

from collections.abc import Callable
from typing import Any

from pylora.errors import ConfigError
from pylora.model.checks import MAX_LAYERS, MAX_SIZE, check_int, flag
from pylora.model.families.common import FULL, SLIDING, layer_types, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Names, Settings
from pylora.model.families.qwen import window, write_window


def _experts(c: Settings, count: str, size: str) -> Fields:
    for name in (count, "num_experts_per_tok", size):
        check_int(f"config.json: {name}", c.get(name), 1, MAX_SIZE)
    if c["num_experts_per_tok"] > c[count]:
        raise ConfigError(
            f"config.json: num_experts_per_tok ({c['num_experts_per_tok']}) is more than the "
            f"{c[count]} experts ({count})"
        )
    return {
        "experts": c[count],
        "experts_per_token": c["num_experts_per_tok"],
        "expert_size": c[size],
    }


def _complete(c: Fields) -> None:
    """transformers 5 writes num_experts under Mixtral's name."""
    if "num_local_experts" in c:
        c["num_experts"] = c.pop("num_local_experts")


def _read_mixtral(c: Settings) -> Fields:
    width = c.get("sliding_window")
    layer_types(c, (), (FULL if width is None else SLIDING,))
    own = {"norm_expert_weights": True, "sliding_window": width}
    return rope(c, 1e6) | _experts(c, "num_local_experts", "intermediate_size") | own


def _write_mixtral(f: Settings) -> Fields:
    return write_rope(f) | {
        "num_local_experts": f["experts"],
        "num_experts_per_tok": f["experts_per_token"],
        "sliding_window": f["sliding_window"],
    }


def _read_qwen3(c: Settings) -> Fields:
    bias, layers = flag(c, "attention_bias"), min(c["num_hidden_layers"], MAX_LAYERS)
    step, without = c.get("decoder_sparse_step", 1), c.get("mlp_only_layers") or []
    check_int("config.json: decoder_sparse_step", step, 1, MAX_SIZE)
    if not isinstance(without, list):
        raise ConfigError(f"config.json: mlp_only_layers must be a list, got {without!r:.60}")
    dense = tuple(i for i in range(layers) if i in without or (i + 1) % step)
    return (
        rope(c)
        | window(c)
        | _experts(c, "num_experts", "moe_intermediate_size")
        | {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "qk_norm": True,
            "norm_expert_weights": flag(c, "norm_topk_prob"),
            "dense_layers": dense,
        }
    )


def _write_qwen3(f: Settings) -> Fields:
    return (
        write_rope(f)
        | write_window(f)
        | {
            "attention_bias": f["attention_bias"],
            "num_experts": f["experts"],
            "num_experts_per_tok": f["experts_per_token"],
            "moe_intermediate_size": f["expert_size"],
            "norm_topk_prob": f["norm_expert_weights"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(f["dense_layers"]),
        }
    )


def _read_olmoe(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    return (
        rope(c)
        | _experts(c, "num_experts", "intermediate_size")
        | {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "qk_norm": True,
            "qk_norm_of": "whole",
            "norm_expert_weights": flag(c, "norm_topk_prob"),
        }
    )


def _write_olmoe(f: Settings) -> Fields:
    return write_rope(f) | {
        "attention_bias": f["attention_bias"],
        "num_experts": f["experts"],
        "num_experts_per_tok": f["experts_per_token"],
        "norm_topk_prob": f["norm_expert_weights"],
    }


_GGUF_KNOWS = frozenset({"expert_count"})


def _gguf(count: str, fixed: Settings | None = None) -> Callable[[Any], Settings]:
    """`fixed`: what llama.cpp does without the file's saying so."""

    def settings(meta: Any) -> Settings:
        out: dict[str, Any] = {
            count: meta.int("expert_count"),
            "num_experts_per_tok": meta.int("expert_used_count"),
            "moe_intermediate_size": meta.int(
                "expert_feed_forward_length", meta.int("feed_forward_length")
            ),
        }
        if count == "num_local_experts" or meta.arch == "olmoe":
            out["intermediate_size"] = out.pop("moe_intermediate_size")
        return out | dict(fixed or {})

    return settings


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    "Mixtral",
    _read_mixtral,
    _write_mixtral,
    sizes=(32000, 4096, 14336, 32, 32),
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    names=Names(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        expert_gate="w1",
        expert_up="w3",
        expert_down="w2",
    ),
    knows=frozenset({"num_local_experts"}),
    gguf=Gguf("llama", permuted=True, settings=_gguf("num_local_experts"), knows=_GGUF_KNOWS),
)
_VL = {  # the text part of Qwen3-VL's, with other defaults
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1408,
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "Qwen3 (mixture of experts)",
    _read_qwen3,
    _write_qwen3,
    sizes=(151936, 2048, 6144, 24, 32),
    defaults={
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    complete=_complete,
    also=dict.fromkeys(("qwen3_vl_moe", "qwen3_vl_moe_text"), _VL),
    knows=frozenset({"num_experts", "moe_intermediate_size", "mlp_only_layers"}),
    gguf=Gguf(
        "qwen3moe",
        settings=_gguf("num_experts", {"norm_topk_prob": True}),
        knows=_GGUF_KNOWS,
    ),
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    "OLMoE",
    _read_olmoe,
    _write_olmoe,
    sizes=(50304, 2048, 2048, 16, 16),
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "eos_token_id": 50279,
    },
    complete=_complete,
    knows=frozenset({"num_experts"}),
    gguf=Gguf("olmoe", settings=_gguf("num_experts", {"norm_topk_prob": False}), knows=_GGUF_KNOWS),
)
