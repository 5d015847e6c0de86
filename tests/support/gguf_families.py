"""A Hugging Face model of any family as llama.cpp's converter writes it, in float32.

Names of tensors and keys are those of the package gguf, which is llama.cpp's own, and not pylora's
tables: what is wrong there shows. Only the sizes come from pylora's reading of config.json.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pylora.conformance.suite import tokenizer
from pylora.formats import open_checkpoint
from pylora.model.config import LlamaConfig

# model_type -> llama.cpp's name of the architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3",
    "granite": "granite", "olmo2": "olmo2", "olmo3": "olmo2", "gpt2": "gpt2",
    "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "cohere": "command-r", "stablelm": "stablelm",
    "starcoder2": "starcoder2", "gpt_neox": "gptneox", "exaone4": "exaone4",
    "gemma": "gemma", "nemotron": "nemotron", "arcee": "arcee", "seed_oss": "seed_oss",
    "ernie4_5": "ernie4_5", "glm4": "glm4", "cohere2": "cohere2",
}  # fmt: skip
_TURNED = (
    "llama",
    "mistral",
    "mixtral",
    "smollm3",
    "granite",
    "arcee",
)  # q and k rotate adjacent rows
_ABOVE_ONE = ("gemma", "gemma2", "gemma3_text", "nemotron")
_RMS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3",
        "smollm3", "granite", "olmo2", "olmo3", "qwen3_moe", "olmoe", "exaone4", "gemma", "arcee",
        "seed_oss", "ernie4_5", "glm4")  # fmt: skip
_SCALINGS = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}


def write(directory: Path, path: Path) -> None:
    """The model in `directory` as the GGUF file `path`, with the suite's tokenizer."""
    with open_checkpoint(directory) as checkpoint:
        config = checkpoint.config
        arch = ARCHITECTURES[config.model_type]
        out = gguf.GGUFWriter(path, arch)
        _keys(out, config)
        for key, value in tokenizer.gguf_metadata().items():
            if isinstance(value, list):
                out.add_array(key, value)
            elif isinstance(value, (bool, str)):
                (out.add_bool if isinstance(value, bool) else out.add_string)(key, value)
            else:
                out.add_uint32(key, value)
        for name, array in _tensors(checkpoint, config).items():
            out.add_tensor(name, np.ascontiguousarray(array, np.float32))
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


def _keys(out: Any, c: LlamaConfig) -> None:
    kind = c.model_type
    out.add_vocab_size(c.vocab_size)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_block_count(c.num_hidden_layers)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    if kind not in ("gpt2", "gpt_neox"):
        out.add_head_count_kv(c.num_key_value_heads)
    (out.add_layer_norm_rms_eps if kind in _RMS else out.add_layer_norm_eps)(c.rms_norm_eps)
    if c.head_dim * c.num_attention_heads != c.hidden_size:
        out.add_key_length(c.head_dim)
        out.add_value_length(c.head_dim)
    if c.rotated and kind != "gpt_neox":
        out.add_rope_freq_base(c.rope_theta)
    if c.rotary_dim != c.head_dim or kind in _TURNED:
        out.add_rope_dimension_count(c.rotary_dim)
    if kind in ("gemma2", "gemma3_text", "olmo3", "exaone4", "phi3", "cohere2"):
        widths = [c.window(i) for i in range(c.num_hidden_layers)]
        if max(widths) or kind == "phi3":
            out.add_sliding_window(max(widths))
        if kind == "olmo3":
            out.add_sliding_window_pattern([w > 0 for w in widths])
    if c.attention_softcap:
        out.add_attn_logit_softcapping(c.attention_softcap)
    if c.logit_softcap:
        out.add_final_logit_softcapping(c.logit_softcap)
    if kind == "granite":
        out.add_attention_scale(c.attention_scale)
        out.add_embedding_scale(c.embedding_multiplier)
        out.add_residual_scale(c.residual_multiplier)
        out.add_logit_scale(1 / c.logit_multiplier)
    if kind in ("cohere", "cohere2"):
        out.add_logit_scale(c.logit_multiplier)
        out.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if kind in ("stablelm", "gpt_neox"):
        out.add_parallel_residual(bool(c.parallel))
    if c.experts:
        out.add_expert_count(c.experts)
        out.add_expert_used_count(c.experts_per_token)
        if kind == "qwen3_moe":
            out.add_expert_feed_forward_length(c.expert_size)
    _scaling(out, c)


def _scaling(out: Any, c: LlamaConfig) -> None:
    scaling = c.rope_scaling
    if scaling is None:
        if c.model_type == "phi3":
            out.add_rope_scaling_orig_ctx_len(c.max_position_embeddings)
        return
    kind = scaling["rope_type"]
    if kind in _SCALINGS:
        out.add_rope_scaling_type(_SCALINGS[kind])
        out.add_rope_scaling_factor(scaling["factor"])
    if kind in ("yarn", "longrope"):
        out.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        longer = c.max_position_embeddings / original
        grown = math.sqrt(1 + math.log(longer) / math.log(original)) if longer > 1 else 1.0
        out.add_rope_scaling_attn_factors(grown)


def _tensors(checkpoint: Any, c: LlamaConfig) -> dict[str, np.ndarray]:
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items()
                if name == ARCHITECTURES[c.model_type])  # fmt: skip
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name in checkpoint.names():
        array = _as_converted(name, checkpoint.load(name), c)
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        whole = re.sub(r"\.norms\.\d+\.", ".", whole)
        there = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert there is not None, f"llama.cpp has no name for {name} of {c.model_type}"
        if whole != name:
            stacks.setdefault(there, []).append(array)
        else:
            found[there] = array
    found |= {there: np.stack(arrays) for there, arrays in stacks.items()}
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") == "longrope":
        found["rope_factors_long.weight"] = np.array(scaling["long_factor"], np.float32)
        found["rope_factors_short.weight"] = np.array(scaling["short_factor"], np.float32)
    if scaling.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = _llama3(c.rope_theta, c.head_dim, scaling)
    return found


def _as_converted(name: str, array: np.ndarray, c: LlamaConfig) -> np.ndarray:
    """What the converter does to the numbers of a tensor."""
    kind = c.model_type
    if kind in _ABOVE_ONE and name.endswith("norm.weight"):
        return array + np.float32(1)
    for role, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
        if kind in _TURNED and re.search(rf"\.{role}_proj\.(weight|bias)$", name):
            half = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            return half.swapaxes(1, 2).reshape(array.shape)
    if kind == "gpt_neox" and ".query_key_value." in name:
        heads = array.reshape(c.num_attention_heads, 3, c.head_dim, *array.shape[1:])
        return heads.swapaxes(0, 1).reshape(array.shape)
    return array


def _llama3(theta: float, head_dim: int, scaling: Any) -> np.ndarray:
    """What the frequencies are divided by, one by one."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    original, factors = scaling["original_max_position_embeddings"], []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * theta ** (i / head_dim)
        smooth = min(max((original / wave - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
