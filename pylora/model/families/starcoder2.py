"""StarCoder2: LayerNorms with biases, a plain GELU, biases everywhere, perhaps a window."""

from typing import Any

from pylora.model.checks import MAX_SIZE, check_int, flag
from pylora.model.families.common import FULL, SLIDING, layer_types, rope, write_rope
from pylora.model.families.family import ALL, GELU_TANH, Family, Fields, Gguf, Names, Settings


def _read(c: Settings) -> Fields:
    bias, window = flag(c, "use_bias", True), c.get("sliding_window")
    if window is not None:
        check_int("config.json: sliding_window", window, 1, MAX_SIZE)
    layer_types(c, (), (FULL if window is None else SLIDING,))
    return rope(c) | {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "sliding_window": window,
    }


def _write(f: Settings) -> Fields:
    return write_rope(f) | {"use_bias": f["mlp_bias"], "sliding_window": f["sliding_window"]}


def _gguf(meta: Any) -> Settings:
    return {"use_bias": meta.tensor("blk.0.attn_q.bias")}


STARCODER2 = Family(
    "starcoder2",
    "Starcoder2ForCausalLM",
    "StarCoder2",
    _read,
    _write,
    sizes=(49152, 3072, 12288, 30, 24),
    defaults={
        "max_position_embeddings": 4096,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    },
    aliases={"norm_epsilon": "rms_norm_eps"},
    names=Names(up="mlp.c_fc", down="mlp.c_proj"),
    activations={**GELU_TANH, **ALL},
    gguf=Gguf("starcoder2", settings=_gguf, knows=frozenset({"attention.sliding_window"})),
)
