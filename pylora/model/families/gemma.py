"""Gemma (1): Llama with norms that multiply by 1 + their weight, a gated GELU, and embeddings that
are multiplied by sqrt(hidden). Gemma 2 and 3 (text) have norms on both sides of each sublayer, and
local layers with a window. Gemma 2 caps scores and logits; Gemma 3 norms q and k heads and has a
rotary base of its own in local layers."""

import math
from typing import Any

from pylora.model.checks import flag, number
from pylora.model.families.common import (
    FULL,
    SLIDING,
    every,
    full_only,
    layer_types,
    one_window,
    optional_number,
    rope,
    rope_by_layer,
    types_of,
    windows,
    write_rope,
    write_rope_by_layer,
)
from pylora.model.families.family import GELU_TANH, Family, Fields, Gguf, Names, Settings

_NAMES = Names(
    mid_norm="pre_feedforward_layernorm",
    after_attention="post_attention_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_KNOWS = frozenset({"attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"})
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}


def _common(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm_places": "both",
        "embedding_multiplier": math.sqrt(c["hidden_size"]),
        "attention_scale": number(c, "query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_softcap": optional_number(c, "attn_logit_softcapping"),
        "logit_softcap": optional_number(c, "final_logit_softcapping"),
    }


def _write(f: Settings) -> Fields:
    scalar = f["attention_scale"] ** -2
    whole = round(scalar)
    return {
        "attention_bias": f["attention_bias"],
        "query_pre_attn_scalar": whole if whole and whole**-0.5 == f["attention_scale"] else scalar,
        "attn_logit_softcapping": f["attention_softcap"] or None,
        "final_logit_softcapping": f["logit_softcap"] or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": one_window(f),
        "layer_types": types_of(f),
    }


def _read1(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    own = {"attention_bias": bias, "attention_out_bias": bias}
    return rope(c) | full_only(c) | own | {"embedding_multiplier": math.sqrt(c["hidden_size"])}


def _write1(f: Settings) -> Fields:
    return write_rope(f) | {"attention_bias": f["attention_bias"]}


def _read2(c: Settings) -> Fields:
    types = layer_types(c, every(2, c["num_hidden_layers"]), (SLIDING, FULL))
    return rope(c) | _common(c) | {"windows": windows(c, types)}


def _write2(f: Settings) -> Fields:
    return write_rope(f) | _write(f)


def _read3(c: Settings) -> Fields:
    pattern = c.get("sliding_window_pattern", c.get("_sliding_window_pattern"))
    default = every(6 if pattern is None else pattern, c["num_hidden_layers"])
    types = layer_types(c, default, (SLIDING, FULL))
    local = c.get("rope_local_base_freq") or 1e4
    return (
        rope_by_layer(c, types, 1e6, local)
        | _common(c)
        | {"windows": windows(c, types), "qk_norm": True}
    )


def _write3(f: Settings) -> Fields:
    return _write(f) | write_rope_by_layer(f)


def _gguf(meta: Any) -> Settings:
    """llama.cpp knows the scale of attention by the size of the model: the 27B ones have a width of
    heads that is not their head_dim."""
    out: dict[str, Any] = {"sliding_window": meta.int("attention.sliding_window")}
    large = meta.int("block_count") == (62 if meta.arch == "gemma3" else 46)
    head = meta.int("attention.key_length", 256)
    if large:
        head = meta.int("embedding_length") // meta.int("attention.head_count")
    out["query_pre_attn_scalar"] = head
    for key, name in (
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        out[name] = meta.float(key) if meta.has(key) else None
    pattern = meta.either("attention.sliding_window_pattern")
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        out["sliding_window_pattern"] = pattern
    elif pattern is not None:
        out["layer_types"] = [SLIDING if local else FULL for local in pattern]
    if meta.has("rope.freq_base_swa"):
        out["rope_local_base_freq"] = meta.float("rope.freq_base_swa")
    return out


_GGUF_KNOWS = frozenset(
    {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"}
)
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    "Gemma (1), CodeGemma",
    _read1,
    _write1,
    sizes=(256000, 3072, 24576, 28, 16),
    defaults={
        "max_position_embeddings": 8192,
        "head_dim": 256,
        "num_key_value_heads": 16,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "tie_word_embeddings": True,
    },
    # The first files say "gelu", and mean its approximation.
    activations={**GELU_TANH, "gelu": "gelu_tanh"},
    unit_offset=True,
    gguf=Gguf("gemma"),
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    "Gemma 2",
    _read2,
    _write2,
    sizes=(256000, 2304, 9216, 26, 8),
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    names=_NAMES,
    knows=_KNOWS,
    activations=GELU_TANH,
    unit_offset=True,
    gguf=Gguf("gemma2", settings=_gguf, knows=_GGUF_KNOWS),
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "Gemma 3 (text)",
    _read3,
    _write3,
    sizes=(262208, 2304, 9216, 26, 8),
    defaults=_DEFAULTS | {"max_position_embeddings": 131072},
    names=_NAMES,
    knows=_KNOWS | {"rope_local_base_freq"},
    activations=GELU_TANH,
    unit_offset=True,
    inside="gemma3",
    gguf=Gguf("gemma3", settings=_gguf, knows=_GGUF_KNOWS),
)
