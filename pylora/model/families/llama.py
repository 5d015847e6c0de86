"""Llama 2 and 3.x, SmolLM2, DeepSeek-R1's distills of Llama, and the many others of this shape."""

from pylora.model.families.common import biases, full_only, rope, write_rope
from pylora.model.families.family import Family, Fields, Gguf, Settings


def _read(c: Settings) -> Fields:
    return rope(c) | biases(c) | full_only(c)


def _write(f: Settings) -> Fields:
    own = {"attention_bias": f["attention_bias"], "mlp_bias": f["mlp_bias"]}
    return write_rope(f) | own | {"sliding_window": None}


LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; DeepSeek-R1 distills",
    _read,
    _write,
    sizes=(32000, 4096, 11008, 32, 32),
    defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    gguf=Gguf("llama", permuted=True),
)
