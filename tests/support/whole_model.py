"""Adapters, batches and architectures that tests of the whole model have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from bounds import gamma

from pylora.model.config import LlamaConfig
from pylora.model.llama import IGNORE, Grads
from pylora.types import LoRA, Seqs

LENGTHS = [5, 1, 6]
SEQS = Seqs.of(LENGTHS)
M = sum(LENGTHS)
# The tiny model is a chain of fewer than 2^15 float64 roundings of numbers of size about one.
TOLERANCE = gamma(2**15, np.float64)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-biases": {
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 8},
}


def an_adapter(
    config: LlamaConfig,
    rng: np.random.Generator,
    *,
    dtype: Any = np.float32,
    zero_b: bool = False,
    biases: bool = False,
    dropout: float = 0.0,
    only: tuple[str, ...] = (),
) -> dict[str, LoRA]:
    """An adapter on every module, or on those whose paths end with one of `only`."""
    out = {}
    for i, (path, spec) in enumerate(config.modules().items()):
        r = 1 + i % 3
        A = rng.standard_normal((r, spec.k)).astype(dtype) / 5
        B = rng.standard_normal((spec.d, r)).astype(dtype) / 5
        b = rng.standard_normal((2, spec.d)).astype(dtype) / 5
        lora = LoRA(A, np.zeros_like(B) if zero_b else B, 0.5 + i % 2, dropout)
        if biases:
            base = None if spec.kind == "embedding" else b[1].copy()
            lora = dataclasses.replace(lora, bias=b[0].copy(), base_bias=base)
        if not only or path.endswith(only):
            out[path] = lora
    return out


def a_batch(rng: np.random.Generator, config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) with some labels not counted."""
    ids, labels = rng.integers(0, config.vocab_size, (2, M))
    labels[[0, 5, 7]] = IGNORE
    return ids, labels


def arrays(lora: LoRA) -> dict[str, np.ndarray]:
    named = {n: getattr(lora, n) for n in ("A", "B", "bias", "base_bias")}
    return {n: a for n, a in named.items() if a is not None}


def bits(ops: Any, grads: Grads) -> dict[str, bytes]:
    return {
        f"{path}.{n}": ops.to_numpy(a).tobytes()
        for path, g in grads.items()
        for n, a in vars(g).items()
        if a is not None
    }


def to_complex(adapter: Mapping[str, LoRA]) -> dict[str, LoRA]:
    return {
        path: dataclasses.replace(lora, **{n: a.astype(complex) for n, a in arrays(lora).items()})
        for path, lora in adapter.items()
    }
