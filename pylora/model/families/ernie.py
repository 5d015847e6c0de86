"""ERNIE 4.5 (dense): Llama that rotates pairs side by side."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    bias = flag(c, "use_bias")
    names = ("attention_bias", "attention_out_bias", "mlp_bias")
    own = {"rope_layout": "interleaved", **dict.fromkeys(names, bias)}
    return rope(c, 5e5) | full_only(c) | own


def _write(f: Settings) -> Fields:
    return write_rope(f) | {"use_bias": f["mlp_bias"]}


def _gguf(meta: Any) -> Settings:
    return {"use_bias": meta.tensor("blk.0.attn_q.bias")}


ERNIE45 = Family(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    "ERNIE 4.5 (dense)",
    _read,
    _write,
    sizes=(103424, 1024, 3072, 18, 16),
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
    gguf=Gguf("ernie4_5", settings=_gguf),
)
