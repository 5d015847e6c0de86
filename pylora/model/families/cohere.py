"""Cohere's Command R: LayerNorms without biases, attention and feed-forward beside each other
behind one norm, rotary pairs side by side, logits that are multiplied."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import factor, full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    return (
        rope(c)
        | full_only(c)
        | {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "norm": "layer",
            "parallel": "one",
            "rope_layout": "interleaved",
            "logit_multiplier": factor(c, "logit_scale", 0.0625),
        }
    )


def _write(f: Settings) -> Fields:
    own = {"attention_bias": f["attention_bias"], "logit_scale": f["logit_multiplier"]}
    return write_rope(f) | own


def _gguf(meta: Any) -> Settings:
    return {"logit_scale": meta.float("logit_scale")} if meta.has("logit_scale") else {}


COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    "Command R",
    _read,
    _write,
    defaults={
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "tie_word_embeddings": True,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    knows=frozenset({"logit_scale"}),
    gguf=Gguf("command-r", settings=_gguf, knows=frozenset({"logit_scale"})),
)
