"""Granite 3 and the dense ones of 4: Llama with multipliers of embeddings, attention, residuals and
logits."""

from typing import Any

from pylora.model.families.common import biases, factor, full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    return (
        rope(c)
        | biases(c)
        | full_only(c)
        | {
            "embedding_multiplier": factor(c, "embedding_multiplier"),
            "residual_multiplier": factor(c, "residual_multiplier"),
            "attention_scale": factor(c, "attention_multiplier"),
            "logit_multiplier": 1.0 / factor(c, "logits_scaling"),
        }
    )


def _write(f: Settings) -> Fields:
    return write_rope(f) | {
        "attention_bias": f["attention_bias"],
        "mlp_bias": f["mlp_bias"],
        "embedding_multiplier": f["embedding_multiplier"],
        "residual_multiplier": f["residual_multiplier"],
        "attention_multiplier": f["attention_scale"],
        "logits_scaling": 1.0 / f["logit_multiplier"],
    }


_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _gguf(meta: Any) -> Settings:
    return {name: meta.float(key) for key, name in _SCALES.items() if meta.has(key)}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "Granite 3, Granite 4 (dense)",
    _read,
    _write,
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    knows=frozenset(
        {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    ),
    gguf=Gguf("granite", permuted=True, settings=_gguf, knows=frozenset(_SCALES)),
)
