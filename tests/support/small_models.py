"""Small valid model files for the tests of readers: GGUF files and Hugging Face directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pylora.formats.safetensors import Bf16, save
from pylora.model.config import LlamaConfig

CACHED = Path.home() / ".cache" / "pylora" / "SmolLM2-135M-Instruct.Q4_1.gguf"
STEP = 1e-30  # of a complex step: its square vanishes, so the slope is exact up to rounding
REAL = Path(os.environ.get("PYLORA_TEST_GGUF") or CACHED)

# Wide enough for the 256-element blocks of the K formats.
CONFIG = LlamaConfig.tiny(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_hidden_layers=2,
    max_position_embeddings=64,
)

_STEMS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def weights(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in config.tensors().items()}


def gguf_name(name: str) -> str:
    stem, ending = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{_STEMS[stem]}.{ending}"
    return f"{_STEMS[stem]}.{ending}"


def interleave(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rows, straight from its definition: row 2i of a head is HF's row i, row
    2i + 1 is HF's row i + n/2."""
    out = np.empty_like(w)
    n = len(w) // heads
    for head in range(heads):
        for i in range(n // 2):
            out[head * n + 2 * i] = w[head * n + i]
            out[head * n + 2 * i + 1] = w[head * n + i + n // 2]
    return out


def write_gguf(
    path: Path,
    config: LlamaConfig = CONFIG,
    kind: str = "F32",
    *,
    arch: str = "llama",
    tensors: Mapping[str, np.ndarray] | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    skip: tuple[str, ...] = (),
    tokenizer: bool = False,
) -> dict[str, np.ndarray]:
    """Writes a GGUF file; returns the weights that a reader must give (after quantization)."""
    qtype = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
    }
    for key, value in numbers.items():
        if key not in skip:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_theta)
    if tokenizer:
        add_tokenizer(writer)
    more(writer)
    expected = {}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, w in (tensors or weights(config)).items():
        part = name.split(".")[-2]
        stored = interleave(w, heads[part]) if arch == "llama" and part in heads else w
        if kind == "F32" or w.ndim == 1:
            writer.add_tensor(gguf_name(name), stored)
            expected[name] = w
        else:
            data = gguf.quants.quantize(stored, qtype)
            writer.add_tensor(gguf_name(name), data, raw_dtype=qtype)
            # Quantization works within rows, so quantizing HF's rows gives the same numbers.
            expected[name] = gguf.quants.dequantize(gguf.quants.quantize(w, qtype), qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b if b in keep else next(rest)) for b in range(256)]


def add_tokenizer(
    writer: gguf.GGUFWriter, pre: str = "smollm", template: str | None = None
) -> None:
    """A byte-level BPE with two special tokens, a user-defined one and a few merges."""
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", *byte_alphabet(), "he", "ll", "hell", "Ġhe"]
    tokens += ["11", "Ġ1"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "he ll", "Ġ he", "1 1", "Ġ 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if template is not None:
        writer.add_chat_template(template)


def write_hf(
    path: Path,
    config: LlamaConfig = CONFIG,
    dtype: str = "f32",
    *,
    shards: int = 0,
    tensors: Mapping[str, np.ndarray] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a Hugging Face directory; returns the stored arrays (bf16 as uint16 bits)."""
    from pylora.formats.base import narrow

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config.to_hf(), **(settings or {})}))
    stored = {name: narrow(w, dtype) for name, w in (tensors or weights(config)).items()}
    out: dict[str, Any] = {n: Bf16(a) if dtype == "bf16" else a for n, a in stored.items()}
    if not shards:
        save(path / "model.safetensors", out, {"format": "pt"})
        return stored
    where = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(out)
    }
    for shard in set(where.values()):
        save(path / shard, {name: out[name] for name in out if where[name] == shard})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return stored
