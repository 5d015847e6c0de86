"""The sizes of the small models of transformers that parity tests of adapters are made on."""

from __future__ import annotations

from typing import Any

VOCAB = 43
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
