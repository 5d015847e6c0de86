"""SmolLM3: Llama with every fourth layer not rotated."""

from pylora.errors import ConfigError
from pylora.model.checks import MAX_LAYERS, MAX_SIZE, check_int, flag
from pylora.model.families.common import (
    FULL,
    SLIDING,
    biases,
    layer_types,
    one_window,
    rope,
    types_of,
    windows,
    write_rope,
)
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    layers, rotated = min(c["num_hidden_layers"], MAX_LAYERS), c.get("no_rope_layers")
    if rotated is None:
        n = c.get("no_rope_layer_interval", 4)
        check_int("config.json: no_rope_layer_interval", n, 1, MAX_SIZE)
        rotated = [int((i + 1) % n != 0) for i in range(layers)]
    good = isinstance(rotated, list) and len(rotated) >= layers
    if not good or any(type(r) is not int or r not in (0, 1) for r in rotated):
        raise ConfigError(f"config.json: no_rope_layers must be {layers} numbers, each 0 or 1")
    local = flag(c, "use_sliding_window") and c.get("sliding_window") is not None
    default = [FULL if r or not local else SLIDING for r in rotated[:layers]]
    types = layer_types(c, default, (SLIDING, FULL))
    own = {"ropes": tuple(r - 1 for r in rotated[:layers]), "windows": windows(c, types)}
    return rope(c, 2e6) | biases(c) | own


def _write(f: Settings) -> Fields:
    return write_rope(f) | {
        "attention_bias": f["attention_bias"],
        "mlp_bias": f["mlp_bias"],
        "no_rope_layers": [r + 1 for r in f["ropes"] or ()],
        "use_sliding_window": one_window(f) is not None,
        "sliding_window": one_window(f),
        "layer_types": types_of(f),
    }


SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    "SmolLM3",
    _read,
    _write,
    sizes=(128256, 2048, 11008, 36, 16),
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
    knows=frozenset({"no_rope_layers"}),
    gguf=Gguf("smollm3", permuted=True),  # every fourth layer is not rotated, as here by default
)
