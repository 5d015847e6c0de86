"""Mistral 7B, Nemo, Small (a window in every layer or none), and Ministral (a window in some)."""

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
    defaults=_DEFAULTS,
    gguf=Gguf("llama", permuted=True, knows=frozenset({"attention.sliding_window"})),
)


def _read_ministral(c: Settings) -> Fields:
    usual = FULL if c["sliding_window"] is None else SLIDING
    types = layer_types(c, [usual] * c["num_hidden_layers"], (SLIDING, FULL))
    return rope(c) | {"windows": windows(c, types)}


def _write_ministral(f: Settings) -> Fields:
    return write_rope(f) | {"sliding_window": one_window(f), "layer_types": types_of(f)}


MINISTRAL = Family(
    "ministral",
    "MinistralForCausalLM",
    "Ministral 8B",
    _read_ministral,
    _write_ministral,
    defaults=_DEFAULTS,
)
