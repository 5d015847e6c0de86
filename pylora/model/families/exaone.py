"""EXAONE 4: norms behind the sublayers, norms of q and k heads, and layers with a window beside
layers that see all and are not rotated."""

from typing import Any

from pylora.errors import ConfigError
from pylora.model.families.common import (
    FULL,
    SLIDING,
    every,
    layer_types,
    one_window,
    rope,
    types_of,
    windows,
    write_rope,
)
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    layers, window = c["num_hidden_layers"], c.get("sliding_window")
    pattern = c.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):  # "LLLG": what the layers are, over and over
        if not pattern or set(pattern) - {"L", "G"}:
            raise ConfigError(
                f"config.json: sliding_window_pattern {pattern!r:.40} must be L and G alone"
            )
        local = [pattern[i % len(pattern)] == "L" for i in range(layers)]
        default = [SLIDING if here else FULL for here in local]
    else:
        default = [FULL] * layers if window is None or not pattern else every(pattern, layers)
    types = layer_types(c, default, (SLIDING, FULL))
    rotated = [window is None or kind == SLIDING for kind in types]
    return rope(c) | {
        "windows": windows(c, types),
        "ropes": tuple(0 if here else -1 for here in rotated),
        "qk_norm": True,
        "norm_places": "after",
    }


def _write(f: Settings) -> Fields:
    window = one_window(f)
    if window is None and any(r < 0 for r in f["ropes"] or ()):
        window = 4096  # no layer has it, and it says that none is rotated
    return write_rope(f) | {"sliding_window": window, "layer_types": types_of(f)}


def _gguf(meta: Any) -> Settings:
    pattern = meta.either("attention.sliding_window_pattern")
    if isinstance(pattern, (list, tuple)):
        return {"layer_types": [SLIDING if local else FULL for local in pattern]}
    return {}


EXAONE4 = Family(
    "exaone4",
    "Exaone4ForCausalLM",
    "EXAONE 4",
    _read,
    _write,
    sizes=(102400, 4096, 16384, 32, 32),
    defaults={
        "max_position_embeddings": 2048,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    gguf=Gguf("exaone4", settings=_gguf, knows=frozenset({"attention.sliding_window"})),
)
