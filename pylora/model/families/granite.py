"""Granite 3 and the dense ones of 4: Llama with multipliers of embeddings, attention, residuals and
logits. Granite 4 calls its feed-forward part a shared expert, with gate and up in one projection,
and may rotate nothing."""

from typing import Any

from pylora.errors import UnsupportedError
from pylora.model.checks import MAX_LAYERS, flag
from pylora.model.families.common import biases, factor, full_only, layer_types, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Names, Settings


def _multipliers(c: Settings) -> Fields:
    return {
        "embedding_multiplier": factor(c, "embedding_multiplier"),
        "residual_multiplier": factor(c, "residual_multiplier"),
        "attention_scale": factor(c, "attention_multiplier"),
        "logit_multiplier": 1.0 / factor(c, "logits_scaling"),
    }


def _read(c: Settings) -> Fields:
    return rope(c) | biases(c) | full_only(c) | _multipliers(c)


def _write(f: Settings) -> Fields:
    return write_rope(f) | {"mlp_bias": f["mlp_bias"]} | _own(f)


def _own(f: Settings) -> Fields:
    return {
        "attention_bias": f["attention_bias"],
        "embedding_multiplier": f["embedding_multiplier"],
        "residual_multiplier": f["residual_multiplier"],
        "attention_multiplier": f["attention_scale"],
        "logits_scaling": 1.0 / f["logit_multiplier"],
    }


def _read_hybrid(c: Settings) -> Fields:
    layers, bias = min(c["num_hidden_layers"], MAX_LAYERS), flag(c, "attention_bias")
    layer_types(c, (), ("attention", "full_attention"))
    how = c.get("position_embedding_type")
    if how not in (None, "nope", "rope"):
        raise UnsupportedError(f"config.json: position_embedding_type is {how!r:.40}, not 'rope'")
    own = {"fused_gate_up": True, "attention_bias": bias, "attention_out_bias": bias}
    rotated = {} if how == "rope" else {"ropes": (-1,) * layers}
    return rope(c) | _multipliers(c) | own | rotated


def _complete_hybrid(c: Fields) -> None:
    """The size of the shared expert is that of the feed-forward part."""
    c["intermediate_size"] = c.pop("shared_intermediate_size")
    if c.get("layer_types") is None:
        c["layer_types"] = c.pop("layers_block_type", None)
    if c["layer_types"] is None:
        raise UnsupportedError(
            "config.json: without layer_types every layer is a Mamba layer, which is not supported"
        )


def _write_hybrid(f: Settings) -> Fields:
    return (
        write_rope(f)
        | _own(f)
        | {
            "position_embedding_type": "rope" if f["ropes"] is None else None,
            "shared_intermediate_size": f["intermediate_size"],
            "layer_types": ["full_attention"] * f["num_hidden_layers"],
            "num_local_experts": 0,
            # Of Mamba layers, which it has none of: sizes that transformers takes.
            "mamba_n_heads": 1,
            "mamba_d_head": 2 * f["hidden_size"],
        }
    )


_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _gguf(meta: Any) -> Settings:
    return {name: meta.float(key) for key, name in _SCALES.items() if meta.has(key)}


GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    "Granite 3, Granite 4 (dense)",
    _read,
    _write,
    sizes=(32000, 4096, 11008, 32, 32),
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    knows=frozenset(
        {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    ),
    gguf=Gguf("granite", permuted=True, settings=_gguf, knows=frozenset(_SCALES)),
)
GRANITE_HYBRID = Family(
    "granitemoehybrid",
    "GraniteMoeHybridForCausalLM",
    "Granite 4 (dense, without Mamba layers)",
    _read_hybrid,
    _write_hybrid,
    sizes=(32000, 4096, 1024, 32, 32),
    defaults={
        "max_position_embeddings": 2048,
        "shared_intermediate_size": 1024,
        "num_local_experts": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    shown={"layer_types": ["full_attention"] * 12, "num_local_experts": 0},
    names=Names(gate_up="shared_mlp.input_linear", down="shared_mlp.output_linear"),
    complete=_complete_hybrid,
    knows=frozenset(
        {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    ),
)
