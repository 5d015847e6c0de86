"""Adapters that other forms find hard to say, for a model of any family, drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.model import families
from pylora.model.config import LlamaConfig
from pylora.types import LoRA

# Small, and wide enough for blocks of 32.
_SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "olmoe": "num_experts"}


def model_of(model_type: str, **over: Any) -> LlamaConfig:
    """A small model of a family, untied."""
    settings = {"model_type": model_type, **_SHAPE}
    if model_type in EXPERTS:
        settings |= {EXPERTS[model_type]: 4, "num_experts_per_tok": 2}
        if model_type == "qwen3_moe":
            settings["moe_intermediate_size"] = 32
    if model_type in ("gpt2", "gpt_neox"):
        settings["num_key_value_heads"] = 4
    if model_type == "granitemoehybrid":
        layers = ["full_attention"] * settings["num_hidden_layers"]
        settings |= {"layer_types": layers, "num_local_experts": 0}
    return LlamaConfig.from_hf(settings | over)


def rules(model: LlamaConfig) -> dict[str, dict[str, Any]]:
    """Settings of adapters by what is odd about them."""
    names = [p for p, s in model.modules().items() if s.kind == "linear"]
    inner = list(dict.fromkeys(p.rpartition(".")[2] for p in names if p != model.names.head))
    first, last = inner[0], inner[-1]
    out: dict[str, dict[str, Any]] = {
        "plain": {"r": 4, "lora_alpha": 8, "target_modules": inner},
        "odd rank and alpha": {"r": 3, "lora_alpha": 7, "target_modules": inner},
        "all linear": {"r": 2, "lora_alpha": 5, "target_modules": "all-linear"},
        "ranks": {"r": 4, "lora_alpha": 8, "target_modules": inner, "rank_pattern": {first: 7}},
        "alphas": {"r": 4, "lora_alpha": 8, "target_modules": inner,
                   "alpha_pattern": {first: 3, last: 40}},
        "rslora": {"r": 6, "lora_alpha": 16, "target_modules": inner, "use_rslora": True},
        "rslora, ranks and alphas": {
            "r": 6, "lora_alpha": 16, "target_modules": inner, "use_rslora": True,
            "rank_pattern": {last: 5}, "alpha_pattern": {first: 11.5}},
        "some layers": {"r": 4, "lora_alpha": 8, "target_modules": inner,
                        "layers_to_transform": [1]},
        "one module": {"r": 4, "lora_alpha": 8, "target_modules": [names[1]]},
        "bias of B that is zero": {"r": 4, "lora_alpha": 8, "target_modules": inner,
                                   "lora_bias": True},
        "dropout": {"r": 4, "lora_alpha": 8, "target_modules": inner, "lora_dropout": 0.25},
    }  # fmt: skip
    if not model.tie_word_embeddings:
        ends = [model.names.embedding, model.names.head]
        out["embedding and head"] = {"r": 4, "lora_alpha": 8, "target_modules": [first, *ends]}
    if model.experts:
        held = [f"{model.names.parameters}.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
        out["experts"] = {"r": 3, "lora_alpha": 6, "target_parameters": held}
        out["experts and more"] = {"r": 3, "lora_alpha": 6, "target_modules": inner,
                                   "target_parameters": held[:1],
                                   "rank_pattern": {first: 2}}  # fmt: skip
    return out


def draw(model: LlamaConfig, settings: dict[str, Any], seed: int = 0) -> Adapter:
    """An adapter of these settings whose A and B are random; a bias of B stays zero."""
    own = {"fan_in_fan_out": True} if model.family.transposed else {}
    held = "target_parameters" in settings
    targets = settings.get("target_modules") or ()
    if held or (not isinstance(targets, str) and model.names.head in targets):
        own = {}
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="some/base",
                        **(own | settings))  # fmt: skip
    rng = np.random.default_rng(seed)
    plan = resolve(config, model.modules())
    loras = {}
    for e in plan:
        A = rng.normal(0, e.k**-0.5, (e.r * e.experts, e.k)).astype(np.float32)
        B = rng.normal(0, 0.3, (e.d, e.r * e.experts)).astype(np.float32)
        bias = np.zeros(e.d, np.float32) if e.lora_bias else None
        loras[e.path] = LoRA(A, B, e.scale, float(config.lora_dropout), bias)
    return Adapter(config, plan, loras)


FAMILIES = [name for name, family in families.ALL.items() if family.gguf is not None]
