"""How many operations and bytes a piece of work cannot do without; shares of the ceiling use these.

Operations are floating-point (or integer) multiplications and additions, 2 for each pair. Only
products are counted: norms, softmax and the like are well below 1 % of them.
"""

from __future__ import annotations

from setting import GEOMETRY, HEAD_DIM, RANK

# Bytes of a stored weight; the quantized formats hold a scale (and a minimum) for each 32.
BYTES = {"fp32": 4.0, "fp32x3": 4.0, "bf16": 2.0, "int8": 34 / 32, "int4": 20 / 32}


def modules() -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear modules of one block."""
    h, f = int(GEOMETRY["hidden_size"]), int(GEOMETRY["intermediate_size"])
    q = int(GEOMETRY["num_attention_heads"]) * HEAD_DIM
    kv = int(GEOMETRY["num_key_value_heads"]) * HEAD_DIM
    return [
        ("q_proj", q, h),
        ("k_proj", kv, h),
        ("v_proj", kv, h),
        ("o_proj", h, q),
        ("gate_proj", f, h),
        ("up_proj", f, h),
        ("down_proj", h, f),
    ]


def weights() -> int:
    """Parameters that each token is multiplied with: the blocks' and the head's."""
    block = sum(d * k for _, d, k in modules())
    head = int(GEOMETRY["vocab_size"]) * int(GEOMETRY["hidden_size"])
    return int(GEOMETRY["num_hidden_layers"]) * block + head


def adapter_numbers(rank: int = RANK) -> int:
    """Numbers in one adapter on q, k, v and o."""
    sides = sum(
        d + k for name, d, k in modules() if name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    return int(GEOMETRY["num_hidden_layers"]) * rank * sides


def attention_flops(length: int) -> float:
    """Of one token's two products q kᵀ and P v in all blocks, half of a sequence being masked."""
    size = int(GEOMETRY["num_attention_heads"]) * HEAD_DIM
    return 2.0 * length * size * int(GEOMETRY["num_hidden_layers"])


def forward_flops(length: int, rank: int = RANK) -> float:
    """Of a token of a sequence of `length`, on the average."""
    return 2.0 * weights() + 2.0 * adapter_numbers(rank) + attention_flops(length)


def step_flops(length: int, rank: int = RANK) -> float:
    """Of a token in a training step: W has no gradient of its own, so x Wᵀ and dy W; the low-rank
    path has two products forward and four backward, attention two and four."""
    return 4.0 * weights() + 6.0 * adapter_numbers(rank) + 3.0 * attention_flops(length)


def decode_bytes(precision: str) -> float:
    """Read for one new token of each sequence of a batch, whatever the batch: every weight once."""
    return BYTES[precision] * weights()


def linear_flops(d: int, k: int, tokens: int, rank: int, backward: bool) -> float:
    """Of one linear with its adapter, forward, or forward and backward."""
    base, low = 2.0 * tokens * d * k, 2.0 * tokens * rank * (d + k)
    return 2 * base + 3 * low if backward else base + low
