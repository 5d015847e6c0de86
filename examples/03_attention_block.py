"""The attention block without a framework: LoRA on q, k, v and o, trained by its own backward pass.

    python examples/03_attention_block.py

The task: the first token of a sequence carries one of four marks, and every token must answer
which. The frozen random weights cannot do it; adapters of rank 4 on the projections learn where to
look.
"""

from __future__ import annotations

import numpy as np

from pylora import backends
from pylora.model.attention import Attention
from pylora.model.config import LlamaConfig
from pylora.model.linear import Grads
from pylora.numbers import random
from pylora.types import AdamW, LoRA, Seqs

STEPS, LENGTH, BATCH, RANK = 150, 8, 16, 4


def main() -> None:
    ops = backends.get()
    rng = np.random.default_rng(0)
    config = LlamaConfig.tiny(
        hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=2
    )
    shapes = config.tensors()

    def weights(name: str) -> np.ndarray:
        return (rng.standard_normal(shapes[name]) / 32**0.5).astype(np.float32)

    block = Attention(config, 0, weights, ops=ops)
    seqs = Seqs.of([LENGTH] * BATCH)
    marks, answers = 2 * rng.standard_normal((2, 4, 32)).astype(np.float32)

    def batch() -> tuple[np.ndarray, np.ndarray]:
        """x [m, 32], noise with a mark on each first token, and the number of the mark [m]."""
        x = rng.standard_normal((BATCH, LENGTH, 32)).astype(np.float32)
        kind = rng.integers(0, 4, BATCH)
        x[:, 0] += marks[kind]
        return x.reshape(-1, 32), np.repeat(kind, LENGTH)

    def right(y: np.ndarray, kind: np.ndarray) -> float:
        """The share of rows whose nearest answer is the right one."""
        distance = ((y[:, None] - answers[None]) ** 2).sum(axis=2)
        return float((distance.argmin(axis=1) == kind).mean())

    # A fresh adapter on each projection changes nothing, bit for bit.
    x, first_kind = batch()
    base, _ = block.forward(x, seqs)
    for linear in block.linears:
        name = random.stream("example", linear.path)
        A = random.normal((RANK, linear.k), 1 / RANK, seed=0, stream=name)
        linear.lora = LoRA(A, np.zeros((linear.d, RANK), np.float32), scale=2.0)
    y, _ = block.forward(x, seqs)
    assert np.array_equal(y, base)

    # Causal: what comes later changes no bit of what came before.
    changed = x.copy()
    changed.reshape(BATCH, LENGTH, 32)[:, -1] = 0
    early, _ = block.forward(changed, seqs)
    assert np.array_equal(
        early.reshape(BATCH, LENGTH, 32)[:, :-1], y.reshape(BATCH, LENGTH, 32)[:, :-1]
    )

    moments: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
    losses = []
    for step in range(1, STEPS + 1):
        x, kind = batch()
        y, cache = block.forward(x, seqs)
        error = y - answers[kind]
        losses.append(float((error * error).mean()))
        grads: Grads = {}
        block.backward(2 * error / np.float32(error.size), cache, grads, need_dx=False)
        for linear in block.linears:
            for name in ("A", "B"):
                param, grad = getattr(linear.lora, name), getattr(grads[linear.path], name)
                m, v = moments.setdefault(
                    (linear.path, name), (np.zeros_like(param), np.zeros_like(param))
                )
                ops.adamw_step(param, grad, m, v, AdamW(lr=1e-2, step=step))

    x, kind = batch()
    before, (y, _) = right(base, first_kind), block.forward(x, seqs)
    after = right(y, kind)
    print(f"{len(block.linears)} adapters of rank {RANK}; weights frozen; backend {ops.name}")
    print(f"mean squared error {losses[0]:.2f} at first, {losses[-1]:.2f} after {STEPS} steps")
    print(f"right answers: {before:.0%} before, {after:.0%} after, on sequences never seen")
    assert before < 0.5 and after > 0.9


if __name__ == "__main__":
    main()
