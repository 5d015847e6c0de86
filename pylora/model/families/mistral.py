"""Mistral 7B, Nemo, Small (a window in every layer or none), Ministral (a window in some), and
Ministral 3 (YaRN; its queries grow with their position behind the original length, so sequences
are not longer than that here)."""

from collections.abc import Mapping
from typing import Any

from pylora.errors import UnsupportedError
from pylora.model.checks import MAX_SIZE, check_int
from pylora.model.families.common import (
    FULL,
    SLIDING,
    layer_types,
    one_window,
    rope,
    types_of,
    windows,
    write_rope,
)
from pylora.model.families.family import Family, Fields, Gguf, Settings

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _read(c: Settings) -> Fields:
    window = c["sliding_window"]
    if window is not None:
        check_int("config.json: sliding_window", window, 1, MAX_SIZE)
    whole = [FULL if window is None else SLIDING] * c["num_hidden_layers"]
    if c.get("layer_types") not in (None, whole):
        raise UnsupportedError("config.json: layer_types does not follow from sliding_window")
    return rope(c) | {"sliding_window": window}


def _write(f: Settings) -> Fields:
    return write_rope(f) | {"sliding_window": f["sliding_window"]}


MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    "Mistral 7B, Nemo, Small",
    _read,
    _write,
    inside="mistral3",
    sizes=(32000, 4096, 14336, 32, 32),
    defaults=_DEFAULTS,
    gguf=Gguf("llama", permuted=True, knows=frozenset({"attention.sliding_window"})),
)


def _read_ministral(c: Settings) -> Fields:
    usual = FULL if c["sliding_window"] is None else SLIDING
    types = layer_types(c, [usual] * c["num_hidden_layers"], (SLIDING, FULL))
    return rope(c) | {"windows": windows(c, types)}


def _write_ministral(f: Settings) -> Fields:
    # transformers asks for a width even where no layer has one.
    window = one_window(f) or f["max_position_embeddings"]
    return write_rope(f) | {"sliding_window": window, "layer_types": types_of(f)}


MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    "Ministral 8B",
    _read_ministral,
    _write_ministral,
    sizes=(32000, 4096, 14336, 32, 32),
    defaults=_DEFAULTS,
)


def _read3(c: Settings) -> Fields:
    raw: Any = c.get("rope_parameters") or c.get("rope_scaling") or _YARN
    beta = "llama_4_scaling_beta"
    if isinstance(raw, Mapping):  # its own number of positions is the configuration's
        raw = {k: v for k, v in raw.items() if k != "max_position_embeddings" and (k != beta or v)}
        if beta in raw and raw.get("rope_type", raw.get("type")) != "yarn":
            raise UnsupportedError(f"config.json: {beta} without YaRN is not supported")
    return _read({**c, "rope_parameters": raw, "rope_scaling": None})


def _write3(f: Settings) -> Fields:
    own = {"rope_theta": f["rope_theta"], **(f["rope_scaling"] or {"rope_type": "default"})}
    return {"rope_parameters": own, "sliding_window": f["sliding_window"]}


_YARN = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = Family(
    "ministral3",
    "Ministral3ForCausalLM",
    "Ministral 3",
    _read3,
    _write3,
    sizes=(131072, 4096, 14336, 34, 32),
    defaults={
        "max_position_embeddings": 262144,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
