"""How many operations and bytes a piece of work cannot do without; shares of the ceiling use these.

Operations are floating-point (or integer) multiplications and additions, 2 for each pair. Only
products are counted: norms, softmax and the like are well below 1 % of them. `model` is a name of
setting.GEOMETRIES; without one it is the run's.
"""

from __future__ import annotations

from collections.abc import Sequence

from setting import RANK, TARGETS, geometry

# Bytes of a stored weight; the quantized formats hold a scale (and a minimum) for each 32.
BYTES = {"fp32": 4.0, "fp32x3": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 34 / 32, "int4": 20 / 32}


def stored_bytes(precision: str) -> float:
    """Bytes of a weight; activations in 8 bits ("int8a8") change nothing about it."""
    return BYTES[precision.removesuffix("a8")]


def modules(model: str | None = None) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear modules of one block."""
    g = geometry(model)
    h, f = int(g["hidden_size"]), int(g["intermediate_size"])
    q = int(g["num_attention_heads"]) * int(g["head_dim"])
    kv = int(g["num_key_value_heads"]) * int(g["head_dim"])
    return [
        ("q_proj", q, h),
        ("k_proj", kv, h),
        ("v_proj", kv, h),
        ("o_proj", h, q),
        ("gate_proj", f, h),
        ("up_proj", f, h),
        ("down_proj", h, f),
    ]


def head_weights(model: str | None = None) -> int:
    g = geometry(model)
    return int(g["vocab_size"]) * int(g["hidden_size"])


def weights(model: str | None = None) -> int:
    """Parameters that each token is multiplied with: the blocks' and the head's."""
    block = sum(d * k for _, d, k in modules(model))
    return int(geometry(model)["num_hidden_layers"]) * block + head_weights(model)


def adapter_numbers(
    rank: int = RANK, model: str | None = None, targets: Sequence[str] = TARGETS
) -> int:
    """Numbers in one adapter on the modules of these names."""
    sides = sum(d + k for name, d, k in modules(model) if name in targets)
    return int(geometry(model)["num_hidden_layers"]) * rank * sides


def attention_flops(length: int, model: str | None = None) -> float:
    """Of one token's two products q kᵀ and P v in all blocks, half of a sequence being masked;
    of a layer with a window, of what it sees."""
    g = geometry(model)
    size = int(g["num_attention_heads"]) * int(g["head_dim"])
    layers, window = int(g["num_hidden_layers"]), int(g.get("sliding_window") or 0)
    kinds = g.get("layer_types") or ["full_attention"] * layers
    seen = 0.0
    for kind in kinds:
        w = min(window, length) if kind == "sliding_attention" and window else length
        seen += w - w * w / (2 * length)  # on the average; length / 2 without a window
    return 4.0 * seen * size


def forward_flops(length: int, rank: int = RANK, model: str | None = None) -> float:
    """Of a token of a sequence of `length`, on the average."""
    own = 2.0 * weights(model) + 2.0 * adapter_numbers(rank, model)
    return own + attention_flops(length, model)


def step_flops(length: int, rank: int = RANK, model: str | None = None) -> float:
    """Of a token in a training step: W has no gradient of its own, so x Wᵀ and dy W; the low-rank
    path has two products forward and four backward, attention two and four."""
    own = 4.0 * weights(model) + 6.0 * adapter_numbers(rank, model)
    return own + 3.0 * attention_flops(length, model)


def decode_bytes(precision: str, model: str | None = None) -> float:
    """Read for one new token of each sequence of a batch, whatever the batch: every weight once."""
    return stored_bytes(precision) * weights(model)


def linear_flops(d: int, k: int, tokens: int, rank: int, backward: bool) -> float:
    """Of one linear with its adapter, forward, or forward and backward."""
    base, low = 2.0 * tokens * d * k, 2.0 * tokens * rank * (d + k)
    return 2 * base + 3 * low if backward else base + low
