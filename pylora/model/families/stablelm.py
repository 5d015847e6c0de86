"""StableLM 2 and 3B: Llama with LayerNorms, a quarter of each head rotated, and in some of them
attention and feed-forward beside each other, and LayerNorms of q and k, one for each head."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Names, Settings


def _read(c: Settings) -> Fields:
    return (
        rope(c, partial=0.25)
        | full_only(c)
        | {
            "attention_bias": flag(c, "use_qkv_bias"),
            "norm": "layer",
            "norm_bias": True,
            "parallel": "one" if flag(c, "use_parallel_residual") else "",
            "qk_norm": flag(c, "qk_layernorm"),
            "qk_norm_of": "each" if flag(c, "qk_layernorm") else "shared",
        }
    )


def _write(f: Settings) -> Fields:
    return write_rope(f) | {
        "partial_rotary_factor": f["partial_rotary"],
        "use_qkv_bias": f["attention_bias"],
        "use_parallel_residual": f["parallel"] == "one",
        "qk_layernorm": f["qk_norm"],
    }


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    return {
        "partial_rotary_factor": meta.int("rope.dimension_count", head) / head,
        "use_parallel_residual": bool(meta.either("use_parallel_residual"))
        and not meta.tensor("blk.0.ffn_norm.weight"),
        "use_qkv_bias": meta.tensor("blk.0.attn_q.bias"),
        "qk_layernorm": meta.tensor("blk.0.attn_q_norm.weight"),
    }


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    "StableLM",
    _read,
    _write,
    sizes=(50304, 2560, 6912, 32, 32),
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    names=Names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm"),
    listed_norms=True,
    knows=frozenset({"partial_rotary_factor", "use_parallel_residual", "qk_layernorm"}),
    gguf=Gguf(
        "stablelm",
        settings=_gguf,
        knows=frozenset({"rope.dimension_count", "use_parallel_residual"}),
    ),
)
