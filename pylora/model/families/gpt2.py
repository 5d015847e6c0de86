"""GPT-2: LayerNorms with biases, learned positions, one projection for q, k and v, a plain GELU,
and projections that its files store [inputs, outputs] (Conv1D; PEFT's fan_in_fan_out)."""

from pylora.errors import UnsupportedError
from pylora.model.checks import MAX_LAYERS, flag
from pylora.model.families.family import ALL, GELU_TANH, Family, Fields, Gguf, Names, Settings

_ALIASES = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_inner": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "activation_function": "hidden_act",
}
_NAMES = Names(
    embedding="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h",
    norm="transformer.ln_f",
    qkv="attn.c_attn",
    o="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    input_norm="ln_1",
    mid_norm="ln_2",
)


def _read(c: Settings) -> Fields:
    if flag(c, "add_cross_attention"):
        raise UnsupportedError("config.json: add_cross_attention is not supported")
    layers = min(c["num_hidden_layers"], MAX_LAYERS)
    scaled, scales = flag(c, "scale_attn_weights", True), None
    if flag(c, "scale_attn_by_inverse_layer_idx"):
        head = c["hidden_size"] // c["num_attention_heads"]
        scales = tuple((head**-0.5 if scaled else 1.0) / (i + 1) for i in range(layers))
    return {
        "ropes": (-1,) * layers,
        "learned_positions": True,
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "fused_qkv": "blocks",
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "attention_scale": None if scaled else 1.0,
        "attention_scales": scales,
    }


def _complete(c: Fields) -> None:
    width = c.get("hidden_size")
    if c.get("intermediate_size") is None and isinstance(width, int):
        c["intermediate_size"] = 4 * width


def _write(f: Settings) -> Fields:
    return {
        "scale_attn_weights": f["attention_scale"] is None,
        "scale_attn_by_inverse_layer_idx": f["attention_scales"] is not None,
    }


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    "GPT-2",
    _read,
    _write,
    sizes=(50257, 768, None, 12, 12),
    defaults={
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu_new",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    },
    aliases=_ALIASES,
    names=_NAMES,
    knows=frozenset({"scale_attn_by_inverse_layer_idx"}),
    activations={**GELU_TANH, **ALL},
    transposed=True,
    gguf=Gguf("gpt2"),
    complete=_complete,
)
