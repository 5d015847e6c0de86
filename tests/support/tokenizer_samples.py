"""Small vocabularies as GGUF metadata, for tests of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from small_models import byte_alphabet

K = "tokenizer.ggml."
WHERE = Path("m.gguf")


def byte_level(pre: str | None = "smollm", **over: Any) -> dict[str, Any]:
    """The metadata of small_models.add_tokenizer, without a file."""
    tokens = ["<|im_start|>", "<|im_end|>", "<think>", *byte_alphabet(), "he", "ll", "hell", "Ġhe"]
    tokens += ["11", "Ġ1"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array([3, 3, 4] + [1] * (len(tokens) - 3), np.int32),
        "merges": ["h e", "l l", "he ll", "Ġ he", "1 1", "Ġ 1"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return {K + key: value for key, value in (metadata | over).items() if value is not None}


def sentencepiece(**over: Any) -> dict[str, Any]:
    special = ["<unk>", "<s>", "</s>"]
    by = [f"<0x{b:02X}>" for b in range(256)]
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "▁hell", "▁hello", "ell", "ello", "▁h"]
    scores = [0.0] * 259 + [-20.0] * 5 + [-3, -1, -2, -4, -9, -6, -5, -7]
    metadata = {
        "model": "llama",
        "tokens": [*special, *by, *words],
        "scores": np.array(scores, np.float32),
        "token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {K + key: value for key, value in (metadata | over).items() if value is not None}
