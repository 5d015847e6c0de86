"""What several families read and write alike: rotary settings, windows, multipliers.

Settings are the content of a `config.json` with the family's defaults in it; both spellings of
rotary settings are read, transformers 4's (rope_theta, rope_scaling) and 5's (rope_parameters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pylora.errors import ConfigError, UnsupportedError
from pylora.model.checks import MAX_LAYERS, MAX_SIZE, check_int, check_positive, flag, is_number
from pylora.model.families.family import Fields, Settings

SLIDING, FULL = "sliding_attention", "full_attention"
_NEEDS_ORIGINAL = ("llama3", "yarn", "longrope")


def rope(
    c: Settings, theta: float = 10000.0, partial: float = 1.0, theta_key: str = "rope_theta"
) -> Fields:
    """rope_theta, rope_scaling and partial_rotary of the same rotation in every layer."""
    raw = c.get("rope_scaling") or c.get("rope_parameters") or {}
    if not isinstance(raw, Mapping) or any(isinstance(v, Mapping) for v in raw.values()):
        raise UnsupportedError("config.json: rope parameters per layer type are not supported")
    return one_rope(c, raw, c.get(theta_key) or theta, partial)


def one_rope(c: Settings, raw: Mapping[str, Any], theta: Any, partial: float = 1.0) -> Fields:
    """One set of rotary parameters; what it leaves out is in `c`, or the defaults given."""
    # What follows belongs to images and video: of text all three positions are one.
    scaling = {k: v for k, v in raw.items() if k not in ("mrope_section", "mrope_interleaved")}
    theta = scaling.pop("rope_theta", None) or theta
    check_positive("config.json: rope_theta", theta)
    part = scaling.pop("partial_rotary_factor", None) or c.get("partial_rotary_factor") or partial
    check_positive("config.json: partial_rotary_factor", part)
    legacy = scaling.pop("type", "default")
    kind = scaling.pop("rope_type", legacy)
    fields: Fields = {"rope_theta": float(theta), "rope_scaling": None}
    fields["partial_rotary"] = float(part)
    if kind in ("default", "mrope", None):
        return fields
    derived = kind == "longrope" or (kind == "yarn" and scaling.get("factor", 0) is None)
    scaling = {k: v for k, v in scaling.items() if v is not None}
    if kind in _NEEDS_ORIGINAL:
        own = c.get("original_max_position_embeddings")
        scaling.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
        if own is not None:  # Phi-3 has it beside the scaling, where it counts for more
            scaling["original_max_position_embeddings"] = own
    if derived and "factor" not in scaling:
        original = scaling["original_max_position_embeddings"]
        check_positive("config.json: original_max_position_embeddings", original)
        scaling["factor"] = c["max_position_embeddings"] / original
    fields["rope_scaling"] = {"rope_type": kind} | scaling
    return fields


def write_rope(fields: Settings, theta_key: str = "rope_theta") -> Fields:
    """The keys that `rope` reads the same fields from; as older files have them."""
    out: Fields = {theta_key: fields["rope_theta"], "rope_scaling": fields["rope_scaling"]}
    if fields["partial_rotary"] != 1.0:
        out["partial_rotary_factor"] = fields["partial_rotary"]
    return out


def rope_by_layer(c: Settings, types: Sequence[str], theta: float, local_theta: Any) -> Fields:
    """The rotation of layers that see all keys, and that of layers with a window. `theta` and
    `local_theta` are for files that do not say."""
    nested = c.get("rope_parameters") or {}
    old = c.get("rope_scaling") or {}
    if not isinstance(nested, Mapping) or not isinstance(old, Mapping):
        raise ConfigError("config.json: rope_parameters and rope_scaling must be objects")
    if not all(isinstance(nested.get(kind) or {}, dict) for kind in (SLIDING, FULL)):
        raise UnsupportedError("config.json: rope_parameters must have an object per layer type")

    def of(given: Mapping[str, Any]) -> dict[str, Any]:
        # transformers looks for `truncate` beside the kinds of layers: inside one it says nothing.
        return {k: v for k, v in given.items() if k != "truncate"}

    fields = one_rope(c, of(nested.get(FULL) or old), c.get("rope_theta") or theta)
    local = one_rope(c, of(nested.get(SLIDING) or {}), local_theta)
    if local["partial_rotary"] != fields["partial_rotary"]:
        raise UnsupportedError("config.json: partial_rotary_factor differs between layer types")
    return fields | {
        "ropes": tuple(int(kind == SLIDING) for kind in types),
        "local_rope_theta": local["rope_theta"],
        "local_rope_scaling": local["rope_scaling"],
    }


def write_rope_by_layer(f: Settings) -> Fields:
    """The keys that `rope_by_layer` reads the same fields from."""
    plain = {"rope_type": "default"}
    one = {"rope_theta": f["rope_theta"], **(f["rope_scaling"] or plain)}
    other = {"rope_theta": f["local_rope_theta"], **(f["local_rope_scaling"] or plain)}
    return {"rope_parameters": {FULL: one, SLIDING: other}}


def layer_types(c: Settings, default: Sequence[str], allowed: Sequence[str]) -> list[str]:
    """The kind of each layer: config.json's list, or the family's default."""
    layers = c["num_hidden_layers"]
    types = c.get("layer_types")
    if types is None:
        return list(default)
    if not isinstance(types, list) or len(types) != layers:
        raise ConfigError(f"config.json: layer_types must be a list of {layers} names")
    for kind in types:
        if kind not in allowed:
            raise UnsupportedError(
                f"config.json: layer_types has {kind!r}; supported are {', '.join(allowed)}"
            )
    return list(types)


def full_only(c: Settings) -> Fields:
    """Nothing, for a family whose layers all see all keys; UnsupportedError where layer_types say
    otherwise."""
    layer_types(c, (), (FULL,))
    return {}


def every(n: int, layers: int, usual: str = SLIDING, other: str = FULL) -> list[str]:
    """Layers n - 1, 2 n - 1, ... are of the other kind."""
    check_int("config.json: sliding_window_pattern", n, 1, MAX_SIZE)
    return [usual if (i + 1) % n else other for i in range(min(layers, MAX_LAYERS))]


def windows(c: Settings, types: Sequence[str]) -> tuple[int, ...]:
    """How many keys a query of each layer sees; 0: all."""
    if SLIDING not in types:
        return (0,) * len(types)
    window = c.get("sliding_window")
    check_int("config.json: sliding_window", window, 1, MAX_SIZE)
    return tuple(int(window) if kind == SLIDING else 0 for kind in types)  # type: ignore[arg-type]


def types_of(fields: Settings) -> list[str]:
    """The layer_types that `windows` of these fields came from."""
    return [SLIDING if w else FULL for w in fields["windows"] or ()]


def one_window(fields: Settings) -> int | None:
    """The one width that the layers' windows have; None where no layer has one."""
    widths = sorted({w for w in fields["windows"] or () if w})
    if len(widths) > 1:
        raise UnsupportedError(f"a config.json has one sliding_window, the model has {widths}")
    return widths[0] if widths else None


def optional_number(c: Settings, name: str) -> float:
    """A positive setting, or 0 for one that is null or 0: "none"."""
    value = c.get(name)
    if value is None or value == 0:
        return 0.0
    check_positive(f"config.json: {name}", value)
    return float(value)


def factor(c: Settings, name: str, default: float = 1.0) -> float:
    """A multiplier: any finite number but 0."""
    value = c.get(name)
    value = default if value is None else value
    if not is_number(value) or value == 0 or value != value or abs(value) > 1e30:
        raise ConfigError(f"config.json: {name} must be a finite number but 0, got {value!r}")
    return float(value)


def biases(c: Settings, attention: str = "attention_bias", mlp: str = "mlp_bias") -> Fields:
    """Whether all four attention projections and all feed-forward ones have biases."""
    on = flag(c, attention)
    return {"attention_bias": on, "attention_out_bias": on, "mlp_bias": flag(c, mlp)}
