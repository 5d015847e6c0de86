"""GLM-4: half of each head rotated, pairs side by side, gate and up in one projection, biases of q,
k and v. The newer ones (model_type glm4) have norms on both sides of each sublayer."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Names, Settings

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rms_norm_eps": 1.5625e-7,
    "eos_token_id": [151329, 151336, 151338],
}
_KNOWS = frozenset({"partial_rotary_factor"})
_SIZES = (151552, 4096, 13696, 40, 32)


def _read(c: Settings) -> Fields:
    return (
        rope(c, partial=0.5)
        | full_only(c)
        | {
            "attention_bias": flag(c, "attention_bias", True),
            "fused_gate_up": True,
            "rope_layout": "interleaved",
        }
    )


def _read4(c: Settings) -> Fields:
    return _read(c) | {"norm_places": "both"}


def _write(f: Settings) -> Fields:
    own = {"partial_rotary_factor": f["partial_rotary"], "attention_bias": f["attention_bias"]}
    return write_rope(f) | own


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    width = meta.int("attention.key_length", head)
    return {"partial_rotary_factor": meta.int("rope.dimension_count", width) / width}


GLM = Family(
    "glm",
    "GlmForCausalLM",
    "GLM-4 (9B-chat-hf, Edge)",
    _read,
    _write,
    sizes=_SIZES,
    defaults=_DEFAULTS,
    knows=_KNOWS,
)
GLM4 = Family(
    "glm4",
    "Glm4ForCausalLM",
    "GLM-4 (0414), GLM-Z1",
    _read4,
    _write,
    sizes=_SIZES,
    defaults=_DEFAULTS,
    names=Names(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
    knows=_KNOWS,
    gguf=Gguf("glm4", settings=_gguf, knows=frozenset({"rope.dimension_count"})),
)
