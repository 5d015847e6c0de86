"""Writes a tiny model, adapters of it, and the seeds of the fuzzers: tests/fuzz/seeds.py FOLDER.

Nothing but the standard library: files are put together byte by byte, as their formats say. Each
fuzzer gets a folder of its own name; `tiny.gguf` is the model that fuzz_adapter reads adapters for.
"""

from __future__ import annotations

import json
import random
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 11, 32, 32, 4, 2, 8
BLOCK = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 30: (1, 2)}
TYPES = {int: 4, float: 6, bool: 7, str: 8}
Tensor = tuple[int, Sequence[int]]  # ggml type, shape with the slowest axis first


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def metadata(key: str, value: Any) -> bytes:
    if isinstance(value, list):
        kind = TYPES[type(value[0])]
        items = b"".join(scalar(v) for v in value)
        return text(key) + struct.pack("<IIQ", 9, kind, len(value)) + items
    return text(key) + struct.pack("<I", TYPES[type(value)]) + scalar(value)


def scalar(value: Any) -> bytes:
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool):
        return struct.pack("<?", value)
    return struct.pack("<f" if isinstance(value, float) else "<I", value)


def numbers(kind: int, count: int, seed: int) -> bytes:
    """`count` numbers of a ggml type: small, so that products stay finite."""
    rng = random.Random(seed)
    block, size = BLOCK[kind]
    if kind == 0:
        return struct.pack(f"<{count}f", *(rng.uniform(-0.5, 0.5) for _ in range(count)))
    if kind == 1:
        return struct.pack(f"<{count}e", *(rng.uniform(-0.5, 0.5) for _ in range(count)))
    if kind == 30:
        raw = numbers(0, count, seed)
        return b"".join(raw[i + 2 : i + 4] for i in range(0, len(raw), 4))
    heads = {2: 1, 3: 2, 8: 1, 12: 2}[kind]  # float16 numbers that a block begins with
    out = b""
    for _ in range(count // block):
        out += struct.pack(f"<{heads}e", *(rng.uniform(0.001, 0.02) for _ in range(heads)))
        out += rng.randbytes(size - 2 * heads)
    return out


def gguf(
    pairs: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    version: int = 3,
    raw: Mapping[str, bytes] | None = None,
) -> bytes:
    """A GGUF file; `raw` gives the bytes of some tensors, the others are random."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs))
    head += b"".join(metadata(key, value) for key, value in pairs.items())
    align, data = int(pairs.get("general.alignment", 32)), b""
    for i, (name, (kind, shape)) in enumerate(tensors.items()):
        count = 1
        for n in shape:
            count *= n
        data += b"\0" * (-len(data) % align)
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += struct.pack("<IQ", kind, len(data))
        data += (raw or {}).get(name) or numbers(kind, count, i)
    return head + b"\0" * (-len(head) % align) + data


def safetensors(tensors: Mapping[str, tuple[str, Sequence[int]]], meta: bool = True) -> bytes:
    """F32, F16 or BF16 tensors of these shapes."""
    kinds = {"F32": 0, "F16": 1, "BF16": 30}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if meta else {}
    data = b""
    for i, (name, (dtype, shape)) in enumerate(tensors.items()):
        count = 1
        for n in shape:
            count *= n
        raw = numbers(kinds[dtype], count, i)
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    body = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(body)) + body + data


def settings(arch: str = "llama", **over: Any) -> dict[str, Any]:
    own = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    } | over
    return {"general.architecture": arch} | {f"{arch}.{k}": v for k, v in own.items()}


def weights(kind: int = 0, norms: bool = False, biases: bool = False) -> dict[str, Tensor]:
    q, kv, b = HEADS * HEAD, KV_HEADS * HEAD, "blk.0."
    out: dict[str, Tensor] = {
        "token_embd.weight": (kind, (VOCAB, HIDDEN)),
        "output_norm.weight": (0, (HIDDEN,)),
        b + "attn_norm.weight": (0, (HIDDEN,)),
        b + "ffn_norm.weight": (0, (HIDDEN,)),
        b + "attn_q.weight": (kind, (q, HIDDEN)),
        b + "attn_k.weight": (kind, (kv, HIDDEN)),
        b + "attn_v.weight": (kind, (kv, HIDDEN)),
        b + "attn_output.weight": (kind, (HIDDEN, q)),
        b + "ffn_gate.weight": (kind, (INNER, HIDDEN)),
        b + "ffn_up.weight": (kind, (INNER, HIDDEN)),
        b + "ffn_down.weight": (kind, (HIDDEN, INNER)),
    }
    if norms:
        out |= {b + "attn_q_norm.weight": (0, (HEAD,)), b + "attn_k_norm.weight": (0, (HEAD,))}
    if biases:
        out |= {b + f"attn_{n}.bias": (0, (q if n == "q" else kv,)) for n in "qkv"}
    return out


def fused(up: int, norms: bool) -> dict[str, Tensor]:
    """With q, k and v in one projection, and what else such families have."""
    q, kv, b = HEADS * HEAD, KV_HEADS * HEAD, "blk.0."
    kv = q if norms else kv
    out: dict[str, Tensor] = {
        "token_embd.weight": (0, (VOCAB, HIDDEN)),
        "output_norm.weight": (0, (HIDDEN,)),
        b + "attn_norm.weight": (0, (HIDDEN,)),
        b + "ffn_norm.weight": (0, (HIDDEN,)),
        b + "attn_qkv.weight": (0, (q + 2 * kv, HIDDEN)),
        b + "attn_output.weight": (0, (HIDDEN, q)),
        b + "ffn_up.weight": (0, (up, HIDDEN)),
        b + "ffn_down.weight": (0, (HIDDEN, INNER)),
    }
    if norms:  # LayerNorms, and biases everywhere
        for name in [n for n in out if n != "token_embd.weight"]:
            out[name.replace(".weight", ".bias")] = (0, (out[name][1][0],))
    return out


def mixture(count: int) -> dict[str, Tensor]:
    """With so many experts of half the size, stacked."""
    b, half = "blk.0.", INNER // 2
    out = {n: t for n, t in weights(0, norms=True).items() if ".ffn_" not in n}
    return out | {
        b + "ffn_norm.weight": (0, (HIDDEN,)),
        b + "ffn_gate_inp.weight": (0, (count, HIDDEN)),
        b + "ffn_gate_exps.weight": (0, (count, half, HIDDEN)),
        b + "ffn_up_exps.weight": (1, (count, half, HIDDEN)),
        b + "ffn_down_exps.weight": (0, (count, HIDDEN, half)),
    }


def adapter_config(**over: Any) -> bytes:
    base = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "lora_dropout": 0.0,
    }
    return json.dumps(base | over).encode()


def lora(paths: Mapping[str, tuple[int, int]], r: int = 2, dtype: str = "F32") -> bytes:
    """adapter_model.safetensors of modules with (d, k)."""
    tensors = {}
    for path, (d, k) in paths.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = (dtype, (r, k))
        tensors[f"base_model.model.{path}.lora_B.weight"] = (dtype, (d, r))
    return safetensors(tensors)


LAYER = "model.layers.0."
Q = {LAYER + "self_attn.q_proj": (HEADS * HEAD, HIDDEN)}
DOWN = {LAYER + "mlp.down_proj": (HIDDEN, INNER)}
GGUF_ADAPTER = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 4.0,
}


def gguf_lora(**over: Any) -> bytes:
    return gguf(
        GGUF_ADAPTER | over,
        {
            "blk.0.attn_q.weight.lora_a": (0, (2, HIDDEN)),
            "blk.0.attn_q.weight.lora_b": (0, (HEADS * HEAD, 2)),
            "token_embd.weight.lora_a": (0, (VOCAB, 3)),
            "token_embd.weight.lora_b": (1, (HIDDEN, 3)),
        },
    )


def models() -> dict[str, bytes]:
    scaled = settings() | {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    words = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 2}
    factors: dict[str, Tensor] = {"rope_freqs.weight": (0, (HEAD // 2,))}
    plain = {"rope_freqs.weight": struct.pack("<4f", 1, 1, 1, 1)}
    return {
        "f32": gguf(settings(), weights()),
        "f16-words": gguf(settings() | words, weights(1)),
        "bf16": gguf(settings(), weights(30) | {"output.weight": (30, (VOCAB, HIDDEN))}),
        "q4_1": gguf(settings() | {"general.alignment": 64}, weights(3)),
        "q8_0-v2": gguf(settings(), weights(8), version=2),
        "qwen2": gguf(settings("qwen2"), weights(2, biases=True)),
        "qwen3": gguf(settings("qwen3"), weights(0, norms=True)),
        "linear": gguf(scaled, weights()),
        "factors": gguf(settings(), weights() | factors, raw=plain),
        "window": gguf(settings(**{"attention.sliding_window": 4}), weights()),
        **others(),
    }


def others() -> dict[str, bytes]:
    """Families beyond Llama's shape."""
    half = {"rope.dimension_count": HEAD // 2}
    factors: dict[str, Tensor] = {
        f"rope_factors_{name}.weight": (0, (HEAD // 4,)) for name in ("short", "long")
    }
    raw = {name: struct.pack("<2f", 1.5, 2.5) for name in factors}
    experts = {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": INNER // 2}
    eps = "attention.layer_norm_rms_epsilon"
    layered = {"attention.layer_norm_epsilon": 1e-5, "attention.head_count_kv": HEADS}

    def norm(arch: str, **over: Any) -> dict[str, Any]:
        return {k: v for k, v in settings(arch, **(layered | over)).items() if eps not in k}

    table: dict[str, Tensor] = {"position_embd.weight": (0, (64, HIDDEN))}
    stretched = half | {"rope.scaling.original_context_length": 3}
    return {
        "phi3": gguf(settings("phi3", **half), fused(2 * INNER, norms=False)),
        "longrope": gguf(
            settings("phi3", **stretched), fused(2 * INNER, norms=False) | factors, raw=raw
        ),
        "gpt2": gguf(norm("gpt2"), fused(INNER, norms=True) | table),
        "gptneox": gguf(
            norm("gptneox", **half, use_parallel_residual=True), fused(INNER, norms=True)
        ),
        "qwen3moe": gguf(settings("qwen3moe", **experts), mixture(3)),
    }


def adapters() -> dict[str, bytes]:
    """Seeds of fuzz_adapter: a byte 0 and a GGUF; or a byte 1, a config's length, both files."""

    def peft(config: bytes, file: bytes) -> bytes:
        return b"\1" + struct.pack("<H", len(config)) + config + file

    both = lora(Q | DOWN)
    pattern = adapter_config(rank_pattern={"q_proj": 3}, alpha_pattern={r".*\.down_proj": 1.5})
    mixed = safetensors(
        {
            f"base_model.model.{LAYER}self_attn.q_proj.lora_A.weight": ("F16", (3, HIDDEN)),
            f"base_model.model.{LAYER}self_attn.q_proj.lora_B.weight": ("BF16", (32, 3)),
            f"base_model.model.{LAYER}mlp.down_proj.lora_A.weight": ("F32", (2, INNER)),
            f"base_model.model.{LAYER}mlp.down_proj.lora_B.weight": ("F32", (HIDDEN, 2)),
        }
    )
    regex = adapter_config(target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.[qd]\w+_proj")
    embedding = safetensors(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": ("F32", (2, VOCAB)),
            "base_model.model.model.embed_tokens.lora_embedding_B": ("F32", (HIDDEN, 2)),
        }
    )
    layers = adapter_config(layers_to_transform=[0], layers_pattern="layers", use_rslora=True)
    return {
        "gguf": b"\0" + gguf_lora(),
        "peft": peft(adapter_config(), both),
        "pattern": peft(pattern, mixed),
        "regex": peft(regex, both),
        "layers": peft(layers, both),
        "embedding": peft(adapter_config(target_modules=["embed_tokens"]), embedding),
        "all": peft(adapter_config(target_modules="all-linear", lora_bias=True), both),
    }


def configs() -> dict[str, bytes]:
    """A config.json of each shape."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
    }
    pairs = [1.0, 2.5, 3.0, 4.0]
    longrope = {"type": "longrope", "short_factor": pairs, "long_factor": pairs}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    both = {"full_attention": yarn, "sliding_attention": {"rope_type": "default"}}
    small = {"n_embd": HIDDEN, "n_head": HEADS, "n_layer": 2, "n_positions": 64}
    own: dict[str, dict[str, Any]] = {
        "llama": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "eos_token_id": [1, 2]},
        "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "gemma3_text": {"sliding_window": 4, "head_dim": 8, "rope_parameters": both},
        "smollm3": {"no_rope_layers": [0, 1]},
        "phi3": {"rope_scaling": longrope, "original_max_position_embeddings": 8},
        "gpt2": {**small, "scale_attn_by_inverse_layer_idx": True},
        "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": False},
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]},
        "mixtral": {"num_local_experts": 4, "sliding_window": None},
    }
    return {
        f"model-{k}": json.dumps({"model_type": k} | sizes | v).encode() for k, v in own.items()
    }


def write(folder: Path) -> None:
    texts = configs() | {
        "config": adapter_config(),
        "deep": b'{"a": [[[[1, -2.5e-3, true, null, "\\u00e9\\ud83d\\ude00\\n"]]]], "b": {}}',
        "numbers": b"[0, -0, 1e308, 123456789012345678, 9223372036854775807, 0.1]",
    }
    files = {
        "one": safetensors({"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("F16", ())}),
        "empty": safetensors({}, meta=False),
        "adapter": lora(Q | DOWN),
    }
    seeds = {
        "fuzz_gguf": models() | {"adapter": gguf_lora()},
        "fuzz_safetensors": files,
        "fuzz_adapter": adapters(),
        "fuzz_json": texts,
    }
    for fuzzer, some in seeds.items():
        (folder / fuzzer).mkdir(parents=True, exist_ok=True)
        for name, content in some.items():
            (folder / fuzzer / name).write_bytes(content)
    (folder / "tiny.gguf").write_bytes(models()["f32"])


if __name__ == "__main__":
    write(Path(sys.argv[1]))
