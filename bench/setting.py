"""What every contender is given: the model's shape, the adapter, a malloc that keeps its pages."""

from __future__ import annotations

import os
from typing import Any

GEOMETRIES: dict[str, dict[str, Any]] = {  # config.json's words, for pylora and transformers alike
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
    "gemma3-270m": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}


def geometry(model: str | None = None) -> dict[str, Any]:
    """config.json of a model. Without a name it is the run's own: run.py --model, which tells its
    contenders by PYLORA_BENCH_MODEL, and by PYLORA_BENCH_TINY that it only shows that it runs."""
    shape = dict(GEOMETRIES[model or os.environ.get("PYLORA_BENCH_MODEL") or "smollm2-135m"])
    if os.environ.get("PYLORA_BENCH_TINY"):
        shape |= {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
        shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        if "layer_types" in shape:
            shape["layer_types"] = ["sliding_attention", "full_attention"]
    return shape


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*TARGETS, "gate_proj", "up_proj", "down_proj")
RANK, ALPHA, LEARNING_RATE = 8, 16, 1e-4

# glibc gives large blocks back to the system at every free, and the next allocation faults its
# pages in again; with these settings it keeps them.
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
