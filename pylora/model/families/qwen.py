"""Qwen2 and 2.5 (biases of q, k and v), and Qwen3 (norms of each q and k head), dense."""

from pylora.errors import UnsupportedError
from pylora.model.checks import MAX_LAYERS, MAX_SIZE, check_int, flag
from pylora.model.families.common import FULL, SLIDING, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
}


def window(c: Settings) -> Fields:
    """sliding_window and max_window_layers: the layers from that one on have the window."""
    width, first = None, 0
    if flag(c, "use_sliding_window"):
        width, first = c.get("sliding_window", 4096), c["max_window_layers"]
        check_int("config.json: max_window_layers", first, 0, MAX_SIZE)
    layers, types = min(c["num_hidden_layers"], MAX_LAYERS), c.get("layer_types")
    has = [width is not None and i >= first for i in range(layers)]
    if types is not None and types != [SLIDING if h else FULL for h in has]:
        raise UnsupportedError(
            "config.json: layer_types does not follow from sliding_window and max_window_layers"
        )
    return {"sliding_window": width, "max_window_layers": first}


def write_window(f: Settings) -> Fields:
    names = ("sliding_window", "max_window_layers")
    return {n: f[n] for n in names} | {"use_sliding_window": f["sliding_window"] is not None}


def _read2(c: Settings) -> Fields:
    return rope(c) | window(c) | {"attention_bias": True}


def _read3(c: Settings) -> Fields:
    bias = flag(c, "attention_bias")
    own = {"qk_norm": True, "attention_bias": bias, "attention_out_bias": bias}
    return rope(c) | window(c) | own


def _write2(f: Settings) -> Fields:
    return write_rope(f) | write_window(f)


def _write3(f: Settings) -> Fields:
    return write_rope(f) | write_window(f) | {"attention_bias": f["attention_bias"]}


# The text parts of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: the same models with other defaults.
_VL2 = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_window_layers": 80,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_VL3 = {"max_position_embeddings": 128000, "rope_theta": 5e5}
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "Qwen2, Qwen2.5; DeepSeek-R1 distills",
    _read2,
    _write2,
    sizes=(151936, 4096, 22016, 32, 32),
    also=dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _VL2),
    defaults=_DEFAULTS,
    gguf=Gguf("qwen2"),
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    "Qwen3 (dense)",
    _read3,
    _write3,
    sizes=(151936, 4096, 22016, 32, 32),
    also=dict.fromkeys(("qwen3_vl", "qwen3_vl_text"), _VL3),
    defaults=_DEFAULTS | {"head_dim": 128},
    gguf=Gguf("qwen3"),
)
