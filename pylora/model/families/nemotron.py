"""Nemotron (LayerNorms that multiply by 1 + their weight, half of each head rotated) and Arcee's
AFM: both have a feed-forward part without a gate, with a squared ReLU."""

from typing import Any

from pylora.model.families.common import biases, full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings

_SQUARED = {"relu2": "relu2", "silu": "silu"}


def _read(c: Settings) -> Fields:
    own = {"norm": "layer", "norm_bias": True, "gated": False}
    return rope(c, partial=0.5) | biases(c) | full_only(c) | own


def _write(f: Settings) -> Fields:
    return _write_arcee(f) | {"partial_rotary_factor": f["partial_rotary"]}


def _read_arcee(c: Settings) -> Fields:
    return rope(c) | biases(c) | full_only(c) | {"gated": False}


def _write_arcee(f: Settings) -> Fields:
    own = {"attention_bias": f["attention_bias"], "mlp_bias": f["mlp_bias"]}
    return write_rope(f) | own


def _gguf(meta: Any) -> Settings:
    head = meta.int("embedding_length") // meta.int("attention.head_count")
    width = meta.int("attention.key_length", head)
    return {"partial_rotary_factor": meta.int("rope.dimension_count", width) / width}


NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    "Nemotron 3, 4, Minitron",
    _read,
    _write,
    sizes=(256000, 6144, 24576, 32, 48),
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    aliases={"norm_eps": "rms_norm_eps"},
    knows=frozenset({"partial_rotary_factor"}),
    activations=_SQUARED,
    unit_offset=True,
    gguf=Gguf("nemotron", settings=_gguf, knows=frozenset({"rope.dimension_count"})),
)
ARCEE = Family(
    "arcee",
    "ArceeForCausalLM",
    "Arcee AFM 4.5B",
    _read_arcee,
    _write_arcee,
    sizes=(32000, 2560, 18432, 32, 32),
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    activations=_SQUARED,
    gguf=Gguf("arcee", permuted=True),
)
