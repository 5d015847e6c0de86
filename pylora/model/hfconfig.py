"""Hugging Face's `config.json` of Llama, Mistral, Qwen2 and Qwen3, in both directions.

`read` gives the fields of `LlamaConfig` (config.py) and refuses what would change the result and is
not implemented. Plain dictionaries only: no file is opened here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pylora.errors import ConfigError, UnsupportedError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000

# What Hugging Face assumes when config.json leaves a key out.
_LLAMA: dict[str, Any] = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {"max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": _QWEN | {"num_key_value_heads": 32},
    "qwen3": _QWEN | {"num_key_value_heads": 32, "head_dim": 128},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LlamaConfig from the content of a `config.json`, with the same defaults."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UnsupportedError(
            f"config.json: model_type is {kind!r}; supported are {', '.join(_DEFAULTS)}"
        )
    c: dict[str, Any] = {**_DEFAULTS[kind], **config}
    _refuse(c)
    need = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for name in (*need, "num_attention_heads"):
        if name not in c:
            raise ConfigError(f"config.json: the key {name!r} is missing")
        check_int(f"config.json: {name}", c[name], 1, MAX_SIZE)
    heads, layers = c["num_attention_heads"], c["num_hidden_layers"]
    theta, scaling = _rope(c)
    window, first = _window(kind, c)
    bias = _flag(c, "attention_bias", kind == "qwen2")
    if kind in ("qwen2", "mistral"):  # they ignore the key: the architecture decides
        bias = kind == "qwen2"
    eos = c.get("eos_token_id")
    head_dim = c.get("head_dim")
    kv_heads = c.get("num_key_value_heads")
    return {
        "model_type": kind,
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": c["hidden_size"] // heads if head_dim is None else head_dim,
        "max_position_embeddings": c["max_position_embeddings"],
        "rms_norm_eps": c.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": _flag(c, "tie_word_embeddings", False),
        "attention_bias": bias,
        "attention_out_bias": bias and kind != "qwen2",
        "mlp_bias": _flag(c, "mlp_bias", False) and kind == "llama",
        "qk_norm": kind == "qwen3",
        "sliding_window": window,
        "max_window_layers": first,
        "bos_token_id": c.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos if isinstance(eos, list) else [eos]),
    }


def write(fields: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` that `read` gives these fields for."""
    kind, biased = fields["model_type"], fields["attention_bias"]
    window = fields["sliding_window"]
    names = ("attention_bias", "attention_out_bias", "mlp_bias", "qk_norm")
    own = tuple(fields[name] for name in names)
    possible = {
        "llama": (biased, biased, fields["mlp_bias"], False),
        "mistral": (False, False, False, False),
        "qwen2": (True, False, False, False),
        "qwen3": (biased, biased, False, True),
    }[kind]
    if own != possible or (window is not None and kind == "llama"):
        raise UnsupportedError(
            f"a config.json of model_type {kind!r} cannot say {', '.join(names)} = {own} "
            f"with sliding_window = {window}; no such architecture exists at Hugging Face"
        )
    out = {k: v for k, v in fields.items() if k not in ("eos_token_ids", *names)}
    if kind in ("llama", "qwen3"):
        out["attention_bias"] = biased
    if kind == "llama":
        out["mlp_bias"] = fields["mlp_bias"]
    eos = fields["eos_token_ids"]
    out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    out["architectures"] = [ARCHITECTURES[kind]]
    out["hidden_act"] = "silu"
    if kind.startswith("qwen"):
        out["use_sliding_window"] = window is not None
    else:
        del out["max_window_layers"]
    return out


def check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def check_positive(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a positive finite number, got {value!r}")


def check_scaling(scaling: dict[str, Any] | None) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in ("linear", "llama3"):
        raise UnsupportedError(
            f"rope_scaling of type {kind!r} is not supported; supported are linear and llama3"
        )
    for name in _LLAMA3_KEYS if kind == "llama3" else ("factor",):
        check_positive(f"rope_scaling[{name!r}]", scaling.get(name))
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError("rope_scaling: low_freq_factor must be below high_freq_factor")


def _flag(c: Mapping[str, Any], name: str, default: bool) -> bool:
    value = c.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def _refuse(c: Mapping[str, Any]) -> None:
    """Settings that change the numbers and that no code here implements."""
    if c.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"config.json: hidden_act {c['hidden_act']!r}; only silu is supported"
        )
    if c.get("quantization_config") is not None:
        raise UnsupportedError("config.json: quantization_config is set; use unquantized weights")
    if c.get("partial_rotary_factor", 1) not in (1, None):
        raise UnsupportedError("config.json: partial_rotary_factor other than 1 is not supported")


def _rope(c: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling`."""
    raw = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(raw, Mapping) or any(isinstance(v, Mapping) for v in raw.values()):
        raise UnsupportedError("config.json: rope parameters per layer type are not supported")
    scaling = dict(raw)
    theta = scaling.pop("rope_theta", None) or c.get("rope_theta") or 10000.0
    check_positive("config.json: rope_theta", theta)
    if scaling.pop("partial_rotary_factor", 1) not in (1, None):
        raise UnsupportedError("config.json: partial_rotary_factor other than 1 is not supported")
    legacy = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", legacy)
    if kind == "default":
        return float(theta), None
    if kind == "llama3":
        scaling.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
    return float(theta), {"rope_type": kind} | scaling


def _window(kind: str, c: Mapping[str, Any]) -> tuple[int | None, int]:
    """(sliding_window, first layer that has it)."""
    if kind == "llama" or (kind != "mistral" and not _flag(c, "use_sliding_window", False)):
        window, first = None, 0
    else:
        window = c.get("sliding_window", 4096)
        first = 0 if kind == "mistral" else c["max_window_layers"]
        check_int("config.json: max_window_layers", first, 0, MAX_SIZE)
    layers, types = min(c["num_hidden_layers"], MAX_LAYERS), c.get("layer_types")
    has = [window is not None and i >= first for i in range(layers)]
    if types is not None and types != ["sliding_attention" if h else "full_attention" for h in has]:
        raise UnsupportedError(
            "config.json: layer_types does not follow from sliding_window and max_window_layers"
        )
    return window, first
