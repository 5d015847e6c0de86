"""Phi-3, Phi-3.5 and Phi-4-mini: q, k and v in one projection, gate and up in one, LongRoPE, and in
Phi-4-mini a part of each head that is not rotated."""

from typing import Any

from pylora.errors import UnsupportedError
from pylora.model.checks import MAX_SIZE, check_int
from pylora.model.families.common import full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    fields = rope(c)
    scaling = fields["rope_scaling"]
    if scaling is not None:
        kind = scaling["rope_type"]
        if kind in ("su", "yarn"):  # what older files of this family call it
            scaling = {**scaling, "rope_type": "longrope"}
        elif kind != "longrope":
            raise UnsupportedError(
                f"config.json: rope_scaling of type {kind!r}; a Phi-3 model has longrope"
            )
        scaling.setdefault("original_max_position_embeddings", c["max_position_embeddings"])
        if c.get("original_max_position_embeddings") is not None:
            scaling["original_max_position_embeddings"] = c["original_max_position_embeddings"]
        original = scaling["original_max_position_embeddings"]
        check_int("config.json: original_max_position_embeddings", original, 1, MAX_SIZE)
        scaling.setdefault("factor", c["max_position_embeddings"] / original)
    window = c.get("sliding_window")
    own = {"fused_qkv": "blocks", "fused_gate_up": True, "sliding_window": window}
    return fields | {"rope_scaling": scaling} | own | (full_only(c) if window is None else {})


def _write(f: Settings) -> Fields:
    scaling = f["rope_scaling"]
    out = write_rope(f) | {"sliding_window": f["sliding_window"]}
    if scaling is not None:
        original = scaling["original_max_position_embeddings"]
        out["original_max_position_embeddings"] = original
        if scaling["factor"] == f["max_position_embeddings"] / original:
            scaling = {k: v for k, v in scaling.items() if k != "factor"}
        out["rope_scaling"] = scaling
    return out


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    part = meta.int("rope.dimension_count", head) / head
    original = meta.int("rope.scaling.original_context_length", meta.int("context_length"))
    return {"partial_rotary_factor": part, "original_max_position_embeddings": original}


PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    "Phi-3, Phi-3.5, Phi-4-mini",
    _read,
    _write,
    sizes=(32064, 3072, 8192, 32, 32),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 32000,
    },
    knows=frozenset({"partial_rotary_factor"}),
    gguf=Gguf(
        "phi3",
        settings=_gguf,
        knows=frozenset({"attention.sliding_window", "rope.dimension_count"}),
    ),
)
