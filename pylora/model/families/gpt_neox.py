"""GPT-NeoX and Pythia: LayerNorms with biases, attention and feed-forward beside each other behind
a norm each, a part of each head rotated, and q, k and v in one projection, head by head."""

from typing import Any

from pylora.model.checks import flag
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import ALL, Family, Fields, Gguf, Names, Settings


def _read(c: Settings) -> Fields:
    bias = flag(c, "attention_bias", True)
    part = c.get("rotary_pct")
    fields = rope(c, partial=0.25 if part is None else part, theta_key="rotary_emb_base")
    return (
        fields
        | full_only(c)
        | {
            "attention_bias": bias,
            "attention_out_bias": bias,
            "mlp_bias": True,
            "norm": "layer",
            "norm_bias": True,
            "gated": False,
            "fused_qkv": "groups",
            "parallel": "two" if flag(c, "use_parallel_residual", True) else "",
        }
    )


def _write(f: Settings) -> Fields:
    out = write_rope(f, "rotary_emb_base")
    out.pop("partial_rotary_factor", None)
    return out | {
        "rotary_pct": f["partial_rotary"],
        "attention_bias": f["attention_bias"],
        "use_parallel_residual": f["parallel"] == "two",
    }


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    return {
        "rotary_pct": meta.int("rope.dimension_count", head) / head,
        "use_parallel_residual": bool(meta.either("use_parallel_residual")),
        "attention_bias": meta.tensor("blk.0.attn_qkv.bias"),
    }


GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    "GPT-NeoX, Pythia",
    _read,
    _write,
    sizes=(50432, 6144, 24576, 44, 64),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "eos_token_id": 2,
    },
    aliases={"layer_norm_eps": "rms_norm_eps"},
    names=Names(
        embedding="gpt_neox.embed_in",
        layer="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        qkv="attention.query_key_value",
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    knows=frozenset({"partial_rotary_factor", "rotary_pct", "use_parallel_residual"}),
    activations={"gelu": "gelu_erf", **ALL},
    gguf=Gguf(
        "gptneox",
        settings=_gguf,
        knows=frozenset({"rope.dimension_count", "use_parallel_residual"}),
    ),
)
