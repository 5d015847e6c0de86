"""Cohere's Command R: LayerNorms without biases, attention and feed-forward beside each other
behind one norm, rotary pairs side by side, logits that are multiplied; in Command R+ a LayerNorm
for each head of q and k. Command R7B and A have windows, and rotate in those layers alone."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import (
    FULL,
    SLIDING,
    every,
    factor,
    full_only,
    layer_types,
    one_window,
    rope,
    types_of,
    windows,
    write_rope,
)
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _common(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm": "layer",
        "parallel": "one",
        "rope_layout": "interleaved",
        "logit_multiplier": factor(c, "logit_scale", 0.0625),
    }


def _read(c: Settings) -> Fields:
    normed = flag(c, "use_qk_norm")
    own = {"qk_norm": normed, "qk_norm_of": "each" if normed else "shared"}
    return rope(c, 5e5) | full_only(c) | _common(c) | own


def _own(f: Settings) -> Fields:
    return {"attention_bias": f["attention_bias"], "logit_scale": f["logit_multiplier"]}


def _write(f: Settings) -> Fields:
    return write_rope(f) | _own(f) | {"use_qk_norm": f["qk_norm"]}


def _read2(c: Settings) -> Fields:
    pattern = c.get("sliding_window_pattern")
    default = every(4 if pattern is None else pattern, c["num_hidden_layers"])
    types = layer_types(c, default, (SLIDING, FULL))
    widths = windows(c, types)
    return (
        rope(c) | _common(c) | {"windows": widths, "ropes": tuple(0 if w else -1 for w in widths)}
    )


def _write2(f: Settings) -> Fields:
    types = {"sliding_window": one_window(f), "layer_types": types_of(f)}
    return write_rope(f) | _own(f) | types


def _gguf2(meta: Any) -> Settings:
    out = dict(_gguf(meta))
    pattern = meta.either("attention.sliding_window_pattern")
    if isinstance(pattern, (list, tuple)):
        out["layer_types"] = [SLIDING if local else FULL for local in pattern]
    return out


def _gguf(meta: Any) -> Settings:
    normed = meta.tensor("blk.0.attn_q_norm.weight")
    scale = {"logit_scale": meta.float("logit_scale")} if meta.has("logit_scale") else {}
    return scale | {"use_qk_norm": normed}


COHERE = Family(
    "cohere",
    "CohereForCausalLM",
    "Command R",
    _read,
    _write,
    sizes=(256000, 8192, 22528, 40, 64),
    defaults={
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "tie_word_embeddings": True,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    knows=frozenset({"logit_scale", "use_qk_norm"}),
    gguf=Gguf("command-r", settings=_gguf, knows=frozenset({"logit_scale"})),
)
COHERE2 = Family(
    "cohere2",
    "Cohere2ForCausalLM",
    "Command R7B, Command A",
    _read2,
    _write2,
    sizes=(256000, 8192, 22528, 40, 64),
    defaults={
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "tie_word_embeddings": True,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    knows=frozenset({"logit_scale"}),
    gguf=Gguf(
        "cohere2",
        settings=_gguf2,
        knows=frozenset({"logit_scale", "attention.sliding_window", "rope.dimension_count"}),
    ),
)
