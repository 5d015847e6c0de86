"""StableLM 2 and 3B: Llama with LayerNorms, a quarter of each head rotated, and in some of them
attention and feed-forward beside each other."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    return (
        rope(c, partial=0.25)
        | full_only(c)
        | {
            "attention_bias": flag(c, "use_qkv_bias"),
            "norm": "layer",
            "norm_bias": True,
            "parallel": "one" if flag(c, "use_parallel_residual") else "",
        }
    )


def _write(f: Settings) -> Fields:
    return write_rope(f) | {
        "partial_rotary_factor": f["partial_rotary"],
        "use_qkv_bias": f["attention_bias"],
        "use_parallel_residual": f["parallel"] == "one",
    }


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    return {
        "partial_rotary_factor": meta.int("rope.dimension_count", head) / head,
        "use_parallel_residual": bool(meta.either("use_parallel_residual"))
        and not meta.tensor("blk.0.ffn_norm.weight"),
        "use_qkv_bias": meta.tensor("blk.0.attn_q.bias"),
    }


STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    "StableLM",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    knows=frozenset({"partial_rotary_factor", "use_parallel_residual"}),
    gguf=Gguf(
        "stablelm",
        settings=_gguf,
        knows=frozenset({"rope.dimension_count", "use_parallel_residual"}),
    ),
)
