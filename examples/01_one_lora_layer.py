"""One LoRA layer by hand: forward, backward, one step of training, merge.

    python examples/01_one_lora_layer.py

Everything is an array: the frozen weight W [d,k], the pair A [r,k] and B [d,r], a scale.
"""

from __future__ import annotations

import numpy as np

from pylora import backends
from pylora.types import LoRA


def main() -> None:
    ops = backends.get(None)  # the C core, or what PYLORA_BACKEND names
    rng = np.random.default_rng(0)
    m, k, d, r, alpha = 5, 32, 24, 8, 16
    x = rng.standard_normal((m, k), dtype=np.float32)
    W = rng.standard_normal((d, k), dtype=np.float32) / np.float32(np.sqrt(k))
    A = rng.standard_normal((r, k), dtype=np.float32) / r
    B = np.zeros((d, r), np.float32)
    lora = LoRA(A, B, scale=alpha / r)
    packed = ops.pack(W)  # once: W never changes

    # B = 0: the adapter is there, and the output is that of the base layer, bit for bit.
    base, _ = ops.lora_forward(x, packed)
    y, h = ops.lora_forward(x, packed, None, lora)
    assert np.array_equal(y, base)
    print("fresh adapter: the output is the base layer's, bit for bit")

    # Teach it to give zeros: loss = |y|² / 2, so dy = y. Only B gets a gradient while B = 0.
    _, dA, dB = ops.lora_backward(y, x, h, packed, lora, need_dx=False)
    assert not dA.any() and dB.any()
    loss = 0.5 * float((y * y).sum())
    for _ in range(300):
        y, h = ops.lora_forward(x, packed, None, lora)
        _, dA, dB = ops.lora_backward(y, x, h, packed, lora, need_dx=False)
        A -= 0.005 * dA  # the arrays belong to us: the adapter sees the change
        B -= 0.005 * dB
    after = 0.5 * float((y * y).sum())
    print(f"loss {loss:.3f} at first, {after:.6f} after 300 steps; W was never written to")
    assert after < 0.01 * loss

    # Merge: one plain layer that does the same, and the way back.
    merged, residue = ops.merge(W, lora)
    y_merged, _ = ops.lora_forward(x, ops.pack(merged))
    print(f"merged against adapter: largest difference {np.abs(y_merged - y).max():.1e}")
    assert np.allclose(y_merged, ops.lora_forward(x, packed, None, lora)[0], atol=1e-4)
    assert np.array_equal(ops.unmerge(merged, lora, residue), W)
    print(f"unmerged: W bit for bit ({len(residue.position)} of {W.size} elements kept aside)")


if __name__ == "__main__":
    main()
