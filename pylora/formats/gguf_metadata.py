"""The metadata and the extra tensors that say in a GGUF file what a configuration says.

What is written is read back: a setting that the format, or llama.cpp's architecture of that name,
cannot say is refused by name, and never left to a default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.formats.base import Array, Shape, read_config
from pylora.formats.gguf_config import hf_config
from pylora.formats.gguf_header import GGUFHeader, GGUFTensor
from pylora.formats.gguf_names import architecture, places
from pylora.model.config import LlamaConfig

_OLD = ("gpt2", "gpt_neox")  # whose files name no heads of keys and no base of the rotation
_SAID_ELSEWHERE = {"bos_token_id", "eos_token_ids", "model_type"}


def model_metadata(config: LlamaConfig) -> dict[str, Any]:
    """The keys of a model's architecture, without those of its tokenizer and of the file.

    Raises UnsupportedError, naming the settings, where they cannot say what the configuration says.
    """
    meta = {f"{architecture(config)}.{key}": value for key, value in _settings(config).items()}
    meta["general.architecture"] = architecture(config)
    _read_back(config, meta)
    return meta


def _settings(c: LlamaConfig) -> dict[str, Any]:
    kind = c.model_type
    out: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
    }
    if kind not in _OLD:
        out["attention.head_count_kv"] = c.num_key_value_heads
    rms = "_rms" if c.norm == "rms" else ""
    out[f"attention.layer_norm{rms}_epsilon"] = float(c.rms_norm_eps)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        out |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if c.rotated:
        if kind != "gpt_neox":
            out["rope.freq_base"] = float(c.rope_theta)
        out["rope.dimension_count"] = c.rotary_dim
    out |= _windows(c)
    if c.attention_softcap:
        out["attn_logit_softcapping"] = float(c.attention_softcap)
    if c.logit_softcap:
        out["final_logit_softcapping"] = float(c.logit_softcap)
    if kind == "granite":
        scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
        out["attention.scale"] = float(scale)
        out["embedding_scale"] = float(c.embedding_multiplier)
        out["residual_scale"] = float(c.residual_multiplier)
        out["logit_scale"] = 1 / c.logit_multiplier
    if kind in ("cohere", "cohere2"):
        out["logit_scale"] = float(c.logit_multiplier)
        out["rope.scaling.type"] = "none"
    if kind in ("stablelm", "gpt_neox"):
        out["use_parallel_residual"] = bool(c.parallel)
    if c.experts:
        out |= {"expert_count": c.experts, "expert_used_count": c.experts_per_token}
        if kind == "qwen3_moe":
            out["expert_feed_forward_length"] = c.expert_size
    return out | _scaling(c)


def _windows(c: LlamaConfig) -> dict[str, Any]:
    widths = [c.window(i) for i in range(c.num_hidden_layers)]
    if not max(widths, default=0) and c.model_type not in (
        "gemma2",
        "gemma3_text",
        "phi3",
        "cohere2",
    ):
        return {}
    out: dict[str, Any] = {"attention.sliding_window": max(widths, default=0)}
    if c.model_type in ("olmo3", "exaone4"):
        out["attention.sliding_window_pattern"] = np.array([w > 0 for w in widths], np.bool_)
    return out


def _scaling(c: LlamaConfig) -> dict[str, Any]:
    scaling = c.rope_scaling
    if scaling is None:
        original = {"rope.scaling.original_context_length": c.max_position_embeddings}
        return original if c.model_type == "phi3" else {}
    kind, out = scaling["rope_type"], {}
    if kind in ("linear", "yarn"):
        out = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind in ("yarn", "longrope"):
        out["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if kind == "yarn":
        for key, name in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if key in scaling:
                out[f"rope.scaling.{name}"] = float(scaling[key])
    if kind == "longrope":
        factor = scaling.get("attention_factor")
        if factor is None:
            original = scaling["original_max_position_embeddings"]
            longer = c.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        out["rope.scaling.attn_factor"] = float(factor)
    return out


def extra_tensors(config: LlamaConfig) -> dict[str, Array]:
    """Tensors that stand for settings of the rotary embedding: float32 vectors by name."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(scaling["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(scaling["short_factor"], np.float32),
        }
    if kind != "llama3":
        return {}
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factors = scaling["original_max_position_embeddings"], []
    for i in range(0, config.rotary_dim, 2):
        wave = 2 * math.pi * config.rope_theta ** (i / config.rotary_dim)
        smooth = min(max((original / wave - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return {"rope_freqs.weight": np.array(factors, np.float32)}


def _read_back(config: LlamaConfig, meta: Mapping[str, Any]) -> None:
    """UnsupportedError unless a file with these metadata is a model of this configuration."""
    tensors, data, at = {}, [], 0
    for name, array in extra_tensors(config).items():
        tensors[name] = GGUFTensor("F32", array.shape, at, at + array.nbytes)
        data.append(array.view(np.uint8))
        at += array.nbytes
    shapes: dict[str, Shape] = {
        there: config.tensors()[hf] for hf, (there, _) in places(config).items()
    }
    for name, shape in shapes.items():
        tensors[name] = GGUFTensor("F32", shape, 0, 0)
    path = Path("what would be written")
    bytes_ = np.concatenate(data) if data else np.zeros(0, np.uint8)
    header = GGUFHeader(path, bytes_, dict(meta), tensors)
    try:
        got = read_config(path, hf_config(header))
    except (FileFormatError, UnsupportedError) as error:
        raise UnsupportedError(
            f"a GGUF file cannot say what this {config.model_type} model is: {error}"
        ) from error
    odd = [
        f.name
        for f in fields(config)
        if f.name not in _SAID_ELSEWHERE
        and not _same(getattr(config, f.name), getattr(got, f.name))
    ]
    if odd:
        said = ", ".join(f"{n} = {str(getattr(config, n))[:60]}" for n in odd)
        raise UnsupportedError(
            f"llama.cpp's architecture {architecture(config)!r} has no model with {said}; write a "
            "Hugging Face folder instead"
        )


def _same(mine: Any, got: Any) -> bool:
    """Equal, numbers in float32, which is what a file holds."""
    if isinstance(mine, Mapping) and isinstance(got, Mapping):
        return all(_same(mine.get(key), got.get(key)) for key in {*mine, *got})
    if isinstance(mine, (list, tuple)) and isinstance(got, (list, tuple)):
        return len(mine) == len(got) and all(map(_same, mine, got))
    if isinstance(mine, float) or isinstance(got, float):
        if mine is None or got is None:
            return mine is got
        return bool(np.isclose(float(mine), float(got), rtol=2e-7, atol=0))
    return bool(mine == got)
