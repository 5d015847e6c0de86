"""What a family has, in words: how its configuration differs from Llama's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.model.config import LlamaConfig
from pylora.model.families.family import Family

# A shape that any family takes; what is shown does not depend on it.
_SHAPE = {
    "vocab_size": 300_000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def example(family: Family) -> LlamaConfig:
    """A small model with the family's defaults."""
    return LlamaConfig.from_hf({"model_type": family.model_type, **_SHAPE, **family.shown})


def in_words(c: LlamaConfig) -> list[str]:
    """The features that Llama has not, each as a short phrase."""
    words: Mapping[str, Any] = {
        "LayerNorm": c.norm == "layer",
        "norms behind the sublayers": c.norm_places == "after",
        "norms before and behind": c.norm_places == "both",
        "norms of 1 + weight": c.family.unit_offset,
        "parallel residual": c.parallel,
        c.activation.replace("_", " "): c.activation != "silu",
        "no gate": not c.gated,
        "one q, k, v": c.fused_qkv,
        "one gate, up": c.fused_gate_up,
        "stored transposed": c.family.transposed,
        "biases": c.attention_bias or c.mlp_bias,
        "q and k normed": c.qk_norm or bool({"use_qk_norm", "qk_layernorm"} & c.family.knows),
        "windows": c.sliding_window is not None or any(c.windows or ()),
        "two rotary bases": c.ropes is not None and 1 in c.ropes,
        "layers not rotated": c.ropes is not None and -1 in c.ropes and c.rotated,
        "learned positions": c.learned_positions,
        "partial rotation": "partial_rotary_factor" in c.family.knows,
        "pairs side by side": c.rope_layout == "interleaved",
        "caps": c.attention_softcap or c.logit_softcap,
        "multipliers": any(
            m != 1 for m in (c.embedding_multiplier, c.residual_multiplier, c.logit_multiplier)
        )
        or "residual_multiplier" in c.family.knows,
        "experts": c.experts,
    }
    return [phrase for phrase, has in words.items() if has]
