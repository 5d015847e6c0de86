"""Are the hand-written gradients right? Compare them with derivatives taken numerically.

    python examples/02_gradient_check.py

The reference runs in float64, where a central difference (f(x + e) - f(x - e)) / 2e is good to
about nine digits. Each gradient is compared along random directions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.reference import Reference
from pylora.types import Attn, LoRA, Seqs

STEP = 1e-6


def slope(f: Callable[[], float], x: np.ndarray, direction: np.ndarray) -> float:
    """d/de f at e = 0, with x moved by e * direction and put back."""
    kept = x.copy()
    x[...] = kept + STEP * direction
    above = f()
    x[...] = kept - STEP * direction
    below = f()
    x[...] = kept
    return (above - below) / (2 * STEP)


def check(name: str, f: Callable[[], float], x: np.ndarray, gradient: np.ndarray) -> None:
    direction = np.random.default_rng(1).standard_normal(x.shape)
    numeric, written = slope(f, x, direction), float((gradient * direction).sum())
    error = abs(numeric - written) / max(abs(numeric), abs(written))
    print(f"  {name:3} numeric {numeric:+.9f}  hand-written {written:+.9f}  error {error:.0e}")
    assert error < 1e-6, name


def main() -> None:
    ops = Reference()
    rng = np.random.default_rng(0)

    print("LoRA linear")
    x, W = rng.standard_normal((6, 10)), rng.standard_normal((8, 10))
    lora = LoRA(rng.standard_normal((3, 10)), rng.standard_normal((8, 3)), scale=0.5)
    weight = rng.standard_normal((6, 8))  # the loss is sum(weight * y), so dy = weight

    def linear() -> float:
        return float((weight * ops.lora_forward(x, W, None, lora)[0]).sum())

    _, h = ops.lora_forward(x, W, None, lora)
    dx, dA, dB = ops.lora_backward(weight, x, h, W, lora)
    check("x", linear, x, dx)
    check("A", linear, lora.A, dA)
    check("B", linear, lora.B, dB)

    print("causal grouped-query attention, two sequences")
    seqs, attn = Seqs.of([4, 3]), Attn(heads=4, kv_heads=2, head_dim=6, scale=6**-0.5)
    q, k, v = (rng.standard_normal((7, heads * 6)) for heads in (4, 2, 2))
    do = rng.standard_normal(q.shape)

    def attention() -> float:
        return float((do * ops.attention_forward(q, k, v, seqs, attn)[0]).sum())

    o, lse = ops.attention_forward(q, k, v, seqs, attn)
    for name, array, gradient in zip(
        "qkv", (q, k, v), ops.attention_backward(do, q, k, v, o, lse, seqs, attn)
    ):
        check(name, attention, array, gradient)

    print("RMS norm")
    w, dy = rng.standard_normal(10), rng.standard_normal((6, 10))
    _, rstd = ops.rms_norm_forward(x, w, 1e-5)
    dx, dw = ops.rms_norm_backward(dy, x, w, rstd, need_dw=True)
    check("x", lambda: float((dy * ops.rms_norm_forward(x, w, 1e-5)[0]).sum()), x, dx)
    check("w", lambda: float((dy * ops.rms_norm_forward(x, w, 1e-5)[0]).sum()), w, dw)


if __name__ == "__main__":
    main()
