"""Hugging Face's `config.json` in both directions: what all families have in common.

`read` gives the fields of `LlamaConfig` (config.py) and refuses what would change the result and is
not carried out; what a family means by its own keys is in `families/`. Plain dictionaries only: no
file is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.errors import ConfigError, UnsupportedError
from pylora.model import families
from pylora.model.checks import MAX_SIZE, check_int, flag
from pylora.model.families.family import Family
from pylora.model.families.keys import refuse_unknown

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ALL_SIZES = ("vocab_size", "hidden_size", "intermediate_size", *_SIZES[2:])
_TEXT = "text_config"
# Keys of the outer config of a multimodal model that count for its text part.
_OUTER = ("tie_word_embeddings", "eos_token_id", "bos_token_id", "quantization_config")
# What writing leaves to the families.
_COMMON = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rms_norm_eps tie_word_embeddings "
    "bos_token_id"
).split()


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the language model: those in "text_config" where the file is of a multimodal
    model, with what the outer file says of the head and the special tokens. They are those of the
    family whose model it is, and whole: a text part leaves out what its class has by default."""
    inner, outer = config.get(_TEXT), config.get("model_type")
    if not isinstance(inner, Mapping):
        family = families.ALSO.get(outer) if isinstance(outer, str) else None
        if family is None:
            return config
        inner = config  # older files of Qwen2-VL have the text part's settings beside the vision's
    kind = inner.get("model_type")
    if not isinstance(kind, str):
        kind = next((f.model_type for f in families.ALL.values() if f.inside == outer), outer)
    family = families.of(kind)
    own = {family.aliases.get(key, key): value for key, value in inner.items()}
    usual = {
        **dict(zip(_ALL_SIZES, family.sizes)),
        **family.defaults,
        **family.also.get(str(kind), {}),
    }
    out = {key: config[key] for key in _OUTER if key in config} | own
    back = {common: alias for alias, common in family.aliases.items()}
    whole = {**usual, **out, "model_type": family.model_type}
    return {back.get(key, key): value for key, value in whole.items() if key != "vision_config"}


def settings_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family, and the settings under their common names, with its defaults filled in."""
    config = text_part(config)
    family = families.of(config.get("model_type"))
    named = {family.aliases.get(key, key): value for key, value in config.items()}
    c = {**family.defaults, **named}
    if family.complete is not None:
        family.complete(c)
    return family, c


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LlamaConfig from the content of a `config.json`, with the same defaults."""
    family, c = settings_of(config)
    activation = _activation(family, c)
    refuse_unknown(c, family.knows, family.title)
    for name in (*_SIZES, "intermediate_size"):
        if name not in c:
            raise ConfigError(f"config.json: the key {name!r} is missing")
        check_int(f"config.json: {name}", c[name], 1, MAX_SIZE)
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    check_int("num_hidden_layers", layers, 1, 10_000)
    check_int("config.json: max_position_embeddings", c["max_position_embeddings"], 1, MAX_SIZE)
    for key in ("bos_token_id", "eos_token_id"):  # a default that a small vocabulary has not
        usual = family.defaults.get(key)
        if c.get(key) == usual and isinstance(usual, (int, list)):
            largest = max(usual) if isinstance(usual, list) else usual
            c[key] = usual if largest < c["vocab_size"] else None
    eos, head_dim, kv_heads = c.get("eos_token_id"), c.get("head_dim"), c.get("num_key_value_heads")
    fields = {
        "model_type": family.model_type,
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": c["hidden_size"] // heads if head_dim is None else head_dim,
        "max_position_embeddings": c["max_position_embeddings"],
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": flag(c, "tie_word_embeddings"),
        "activation": activation,
        "bos_token_id": c.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos if isinstance(eos, list) else [eos]),
    }
    fields |= family.read(c)
    if fields.get("partial_rotary", 1.0) != 1 and "partial_rotary_factor" not in family.knows:
        raise UnsupportedError(
            f"config.json: partial_rotary_factor is {fields['partial_rotary']}, and a "
            f"{family.title} model has no such feature here"
        )
    return fields


def _activation(family: Family, c: Mapping[str, Any]) -> str:
    said = c.get("hidden_activation") or c.get("hidden_act")
    if said is None:
        return next(iter(family.activations.values()))
    if not isinstance(said, str) or said not in family.activations:
        raise UnsupportedError(
            f"config.json: hidden_act is {said!r}; a {family.title} model is supported with "
            f"{', '.join(family.activations)}"
        )
    return family.activations[said]


def write(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` that `read` gives these fields for. `defaults`: of the fields
    that a family need not name."""
    family = families.of(fields["model_type"])
    out = {name: fields[name] for name in _COMMON}
    eos = fields["eos_token_ids"]
    out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    out["architectures"] = [family.architecture]
    out["hidden_act"] = next(
        (name for name, does in family.activations.items() if does == fields["activation"]), None
    )
    out |= family.write(dict(fields))
    back = {alias: out.pop(common) for alias, common in family.aliases.items() if common in out}
    out |= back
    again = read(out)
    lost = [name for name, value in again.items() if fields[name] != value]
    lost += [n for n, default in defaults.items() if n not in again and fields[n] != default]
    if lost:
        said = ", ".join(f"{name} = {fields[name]!r:.60}" for name in lost)
        raise UnsupportedError(
            f"a config.json of model_type {family.model_type!r} cannot say {said}; no such "
            "architecture exists at Hugging Face"
        )
    return out
