"""The shapes that bench/gpu.py measures: LoRA linears, Llama-3-8B's geometry."""

from __future__ import annotations

from typing import Any

GEOMETRY: dict[str, Any] = {  # Llama-3-8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
HEAD_DIM = 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, COMPILED_RANK, LEARNING_RATE = 16, 16, 1e-4
CEILING = 8192  # side of the large product

_WIDTHS, _RANKS, _TOKENS = [1024, 4096, 14336], [8, 16, 64], [1, 16, 512, 8192]
_STEPS = [(1, 2048), (4, 2048)]
_DECODE = {"rows": 64, "prompt": 128, "layers": 8}
_ADAPTERS = [1, 8, 64]
_MERGES = [4096, 14336]


def tiny() -> None:
    """Shapes that a laptop runs in seconds."""
    global HEAD_DIM, CEILING, _WIDTHS, _RANKS, _TOKENS, _STEPS, _DECODE, _ADAPTERS, _MERGES
    GEOMETRY.update(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    HEAD_DIM, CEILING, _WIDTHS, _RANKS, _TOKENS = 16, 64, [32], [8, 16], [1, 20]
    _STEPS, _DECODE, _ADAPTERS = [(2, 8)], {"rows": 4, "prompt": 5, "layers": 1}, [1, 4]
    _MERGES = [32]


def linears() -> list[dict[str, Any]]:
    """Square weights; the rank of the other tables first, so that little time leaves the most."""
    ranks = sorted(_RANKS, key=lambda r: r != COMPILED_RANK)
    return [
        {"width": d, "rank": r, "tokens": m, "backward": backward}
        for r in ranks
        for d in _WIDTHS
        for m in _TOKENS
        for backward in (False, True)
    ]


def steps() -> list[dict[str, Any]]:
    """`alone`: two models do not fit beside each other. Recomputing: gradient checkpointing."""
    return [
        {"batch": b, "length": n, "recompute": recompute, "alone": True}
        for recompute in (False, True)
        for b, n in _STEPS
    ]


def decodes() -> list[dict[str, Any]]:
    return [{**_DECODE, "adapters": n, "alone": True} for n in _ADAPTERS]


def merges() -> list[dict[str, Any]]:
    return [{"width": d, "rank": RANK, "precision": p} for d in _MERGES for p in ("bf16", "fp32")]


def modules(layers: int) -> list[tuple[int, int]]:
    """(d, k) of every linear module of the blocks."""
    g = GEOMETRY
    hidden, inner = g["hidden_size"], g["intermediate_size"]
    q, kv = g["num_attention_heads"] * HEAD_DIM, g["num_key_value_heads"] * HEAD_DIM
    one = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    return (one + [(inner, hidden), (inner, hidden), (hidden, inner)]) * layers


def step_flops(batch: int, length: int) -> float:
    """Useful operations of a step: for each weight and token 2 forward and 2 in dy W (W has no
    gradient), attention's two products forward and five backward over the causal half, and three
    times those of A and B."""
    tokens, layers = batch * length, GEOMETRY["num_hidden_layers"]
    weights = sum(d * k for d, k in modules(layers))
    weights += GEOMETRY["vocab_size"] * GEOMETRY["hidden_size"]
    low = sum(RANK * (d + k) for d, k in modules(layers))
    q = GEOMETRY["num_attention_heads"] * HEAD_DIM
    attention = layers * 7 * 2 * q * (length / 2)
    return tokens * (4.0 * weights + 6.0 * low + attention)
