"""Inputs of the single operations on which a change must show: norms, gates, rotations, losses,
steps. Drawn as corpus.py draws, wider than the laws do, and by none of their strategies."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.ops.features import ACTIVATIONS
from pylora.types import AdamW, Array

METHODS = (
    "rms_norm", "swiglu", "swiglu_backward", "rope", "rope_part", "layer_norm",
    "layer_norm_backward", "activation", "activation_backward", "soft_cap", "soft_cap_backward",
    "experts", "cross_entropy", "adamw", "clip", "adapter_step",
)  # fmt: skip


def arguments(method: str, draw: Any) -> tuple[Any, ...]:
    """Of one call; `draw` is corpus.Draw."""
    rng, dtype = draw.rng, draw.pick(draw.dtypes)
    m, n = draw.size(0), draw.size()
    odd = rng.random() < 0.3

    def array(*shape: int) -> Array:
        a: Array = draw.array(shape, dtype, odd)
        return a

    x, up, dy, w = array(m, n), array(m, n), array(m, n), array(n)
    eps, maybe = draw.pick((1e-6, 1e-5, 1e-2)), rng.random() < 0.5
    if method.startswith("rms_norm"):
        return x, w, eps
    if method.startswith("layer_norm"):
        return (dy, x, w, eps) if method.endswith("backward") else (x, w, w if maybe else None, eps)
    if method.startswith("swiglu"):
        return (dy, x, up) if method.endswith("backward") else (x, up)
    if method.startswith("activation"):
        kind = draw.pick(ACTIVATIONS)
        more = (dy,) if method.endswith("backward") else ()
        return (kind, *more, x, up if maybe else None)
    if method.startswith("soft_cap"):
        before = (dy,) if method.endswith("backward") else ()
        return (*before, x, draw.pick((1.0, 0.3, -2.0)), draw.pick((0.0, 30.0, 1.5)))
    if method.startswith("rope"):
        heads, D = draw.pick((1, 2, 5)), 2 * draw.pick((1, 2, 3, 8, 32))
        position = rng.integers(0, draw.pick((4, 300, 70000)), m).astype(np.int64)
        part = (2 * int(rng.integers(1, D // 2 + 1)),) if method == "rope_part" else ()
        theta, layout = draw.pick((10000.0, 50.0)), draw.pick(("half", "interleaved"))
        return array(m, heads * D), position, D, *part, theta, layout, bool(maybe)
    if method == "experts":
        logits = np.round(4 * array(m, n).astype(np.float64)) / 4
        return np.nan_to_num(logits).astype(x.dtype), int(rng.integers(1, n + 1)), bool(maybe)
    if method == "cross_entropy":
        labels = rng.integers(0, n, m)
        labels[rng.random(m) < draw.pick((0.0, 0.4, 1.0))] = -100
        return x, labels.astype(np.int64)
    if method == "clip":
        grads = [array(*s) for s in ((3,), (m, n), (1, 4))[: int(rng.integers(1, 4))]]
        return grads, float(10.0 ** rng.uniform(-3, 3))
    if method == "adapter_step":
        params = {"A": array(2, n), "B": array(m, 2), "bias": array(n)}
        slopes = {name: np.ones_like(p) for name, p in params.items()}
        return params, slopes, 0.01, draw.pick((0.0, 0.1)), draw.pick((1.0, 16.0))
    if method == "adamw":
        settings = AdamW(lr=0.01, step=draw.pick((1, 2, 1000)), weight_decay=draw.pick((0.0, 0.1)))
        return x, up, dy * x.dtype.type(0.1), np.abs(x), settings
    return ()
