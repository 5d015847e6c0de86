"""Settings of a model, checked one by one: whole and positive numbers, flags, rope scalings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pylora.errors import ConfigError, UnsupportedError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# What each kind of rope scaling needs, and may have.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (_LLAMA3, ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "llama_4_scaling_beta",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}


def check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_positive(name: str, value: object) -> None:
    if not is_number(value) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a positive finite number, got {value!r}")


def check_scaling(scaling: Mapping[str, Any] | None, pairs: int) -> None:
    """ConfigError or UnsupportedError for a scaling that cannot be carried out; `pairs`: how many
    pairs of a head are rotated."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise UnsupportedError(
            f"rope_scaling of type {kind!r} is not supported; supported are {', '.join(SCALINGS)}"
        )
    needed, optional = SCALINGS[kind]
    for name in (*needed, *optional):
        value = scaling.get(name)
        if value is None and name in optional:
            continue
        if name == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"rope_scaling['truncate'] must be true or false, got {value!r}")
        elif name in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or len(value) != pairs:
                got = len(value) if isinstance(value, (list, tuple)) else value
                raise ConfigError(
                    f"rope_scaling[{name!r}] must be a list of {pairs} numbers, one for each pair "
                    f"that is rotated, got {got!r}"
                )
            for number in value:
                check_positive(f"rope_scaling[{name!r}]", number)
        else:
            check_positive(f"rope_scaling[{name!r}]", value)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ConfigError("rope_scaling: low_freq_factor must be below high_freq_factor")
    unknown = set(scaling) - {"rope_type", *needed, *optional}
    if unknown and kind in ("yarn", "longrope", "dynamic"):
        raise UnsupportedError(
            f"rope_scaling of type {kind!r} has {', '.join(map(repr, sorted(unknown)))}, which is "
            "not supported"
        )


def flag(c: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A setting of a config.json that is true or false; null stands for the default."""
    value = c.get(name, default)
    if value is None:
        value = default
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def number(c: Mapping[str, Any], name: str, default: float) -> float:
    """A positive setting of a config.json; null stands for the default."""
    value = c.get(name)
    if value is None:
        return default
    check_positive(f"config.json: {name}", value)
    return float(value)
