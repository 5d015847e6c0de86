"""Seed-OSS: Llama with biases of q, k and v, and of the output where a file says so."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    return (
        rope(c)
        | full_only(c)
        | {
            "attention_bias": flag(c, "attention_bias", True),
            "attention_out_bias": flag(c, "attention_out_bias"),
            "mlp_bias": flag(c, "mlp_bias"),
        }
    )


def _write(f: Settings) -> Fields:
    names = ("attention_bias", "attention_out_bias", "mlp_bias")
    return write_rope(f) | {name: f[name] for name in names}


def _gguf(meta: Any) -> Settings:
    return {"attention_out_bias": meta.tensor("blk.0.attn_output.bias")}


SEED_OSS = Family(
    "seed_oss",
    "SeedOssForCausalLM",
    "Seed-OSS",
    _read,
    _write,
    sizes=(155136, 4096, 27648, 64, 80),
    defaults={
        "max_position_embeddings": 524288,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    gguf=Gguf("seed_oss", stems={"post_attention_norm": "mid_norm"}, settings=_gguf),
)
