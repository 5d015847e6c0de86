"""OLMo 2 and 3: norms behind the sublayers alone, and norms of the whole q and k projections. OLMo
3 has windows in three of four layers, whose rotary embedding is not scaled."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import (
    FULL,
    SLIDING,
    every,
    full_only,
    layer_types,
    one_window,
    rope,
    rope_by_layer,
    types_of,
    windows,
    write_rope,
    write_rope_by_layer,
)
from pylora.model.families.family import Family, Fields, Gguf, Settings

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}


def _common(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "norm_places": "after",
        "qk_norm": True,
        "qk_norm_of": "whole",
    }


def _read2(c: Settings) -> Fields:
    return rope(c) | _common(c) | full_only(c)


def _write2(f: Settings) -> Fields:
    return write_rope(f) | {"attention_bias": f["attention_bias"]}


def _read3(c: Settings) -> Fields:
    types = layer_types(c, every(4, c["num_hidden_layers"]), (SLIDING, FULL))
    theta = c.get("rope_theta") or 5e5
    return rope_by_layer(c, types, theta, theta) | _common(c) | {"windows": windows(c, types)}


def _write3(f: Settings) -> Fields:
    return write_rope_by_layer(f) | {
        "attention_bias": f["attention_bias"],
        "sliding_window": one_window(f),
        "layer_types": types_of(f),
    }


def _gguf3(meta: Any) -> Settings:
    pattern = meta.either("attention.sliding_window_pattern")
    if isinstance(pattern, (list, tuple)):
        return {"layer_types": [SLIDING if local else FULL for local in pattern]}
    return {}


OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    "OLMo 2",
    _read2,
    _write2,
    sizes=(50304, 4096, 11008, 32, 32),
    defaults=_DEFAULTS,
    gguf=Gguf("olmo2"),
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    "OLMo 3",
    _read3,
    _write3,
    sizes=(50304, 4096, 11008, 32, 32),
    defaults=_DEFAULTS | {"sliding_window": 4096},
    gguf=Gguf("olmo2", settings=_gguf3, knows=frozenset({"attention.sliding_window"})),
)
