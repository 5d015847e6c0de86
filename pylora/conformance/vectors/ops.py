"""Golden vectors of one linear layer, and what the other files of vectors are made with.

Inputs are drawn from pylora's own streams, so any language can draw them too. The reference runs
in float64 on the float32 inputs.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.numbers import random
from pylora.reference import Reference
from pylora.types import Array, Drop, LoRA

SEED = 2021
_ref = Reference()
RULE = "bounds.lora_forward, lora_backward: gamma_n times the summed magnitudes (N-1)"


def draw(name: str, shape: tuple[int, ...], std: float = 1.0) -> Array:
    """float32 normal numbers of the stream vectors/<name>."""
    return random.normal(shape, std, seed=SEED, stream=random.stream("vectors", name))


def wide(a: Array) -> Array:
    return a.astype(np.float64)


def cases() -> list[Case]:
    """All cases of this file."""
    usual: dict[str, Any] = {"m": 5, "d": 7, "k": 11, "r": 3, "alpha": 6.0}
    rank9: dict[str, Any] = {"d": 5, "k": 4, "r": 9, "alpha": 9.0}
    tiles: dict[str, Any] = {"m": 17, "d": 34, "k": 67, "r": 33, "alpha": 16.0}
    return [
        lora_case("lora-plain", ("S-1", "S-3", "F-1", "B-1"), **usual),
        lora_case("lora-bias", ("F-3",), bias=True, **usual),
        lora_case("lora-bias-of-B", ("F-4", "B-5", "M-4"), bias=True, lora_bias=True, **usual),
        lora_case("lora-rslora", ("S-1", "S-3"), use_rslora=True, **usual),
        lora_case("lora-negative", ("S-4",), **usual | {"alpha": -1.5}),
        lora_case("lora-scale-zero", ("S-4",), **usual | {"alpha": 0.0}),
        lora_case("lora-scale-large", ("S-4",), **usual | {"alpha": 3e4}),
        lora_case("lora-rank-1", ("S-1", "F-6"), **usual | {"r": 1}),
        lora_case("lora-rank-above-sizes", ("F-6",), **usual | rank9),
        lora_case("lora-beyond-tiles", ("F-1", "F-6", "B-1"), **tiles),
        lora_case("lora-one-token", ("F-6",), **usual | {"m": 1}),
        lora_case("lora-one-of-each", ("F-6",), m=1, d=1, k=1, r=1, alpha=0.5),
        lora_case("lora-no-tokens", ("F-6", "B-3"), bias=True, **usual | {"m": 0}),
        lora_case("lora-fresh", ("I-1", "F-2", "B-4"), fresh=True, **usual),
        lora_case("lora-B-last", ("F-1", "B-1"), sparse=-0.75, **usual),
        lora_case("lora-B-sums-to-zero", ("F-1", "B-1"), sparse=0.0, **usual),
        lora_case("lora-dropout", ("D-1", "D-2", "D-3"), p=0.25, **usual),
        lora_case("lora-dropout-most", ("D-2", "D-3"), p=0.9375, **usual),
        lora_case("lora-dropout-none", ("D-4",), p=0.0, **usual),
    ]


def lora_case(
    name: str,
    spec: tuple[str, ...],
    *,
    m: int,
    d: int,
    k: int,
    r: int,
    alpha: float,
    use_rslora: bool = False,
    bias: bool = False,
    lora_bias: bool = False,
    fresh: bool = False,
    sparse: float | None = None,
    p: float | None = None,
) -> Case:
    """Forward and backward of one layer, with h and g. Each bound is that of the whole chain from
    the inputs: dB's includes what the rounding of h adds to it. `sparse`: B is zero but for this
    number in its last place, or, if it is 0 itself, for 1 and -1: neither is an empty B."""
    scale = alpha / math.sqrt(r) if use_rslora else alpha / r
    params: dict[str, Any] = {"r": r, "alpha": alpha, "use_rslora": use_rslora, "scale": scale}
    drop = None
    if p is not None:
        path, step, row0 = "model.layers.0.mlp.up_proj", 3, 2
        drop = Drop(p, 7, random.stream("dropout", path, str(step)), row0)
        params |= {"p": p, "seed": "7", "path": path, "step": step, "row0": row0}
        params["stream"] = str(drop.stream)
    case = Case(name, "lora", spec, params)
    inputs = case.inputs
    inputs["x"] = draw(f"{name}/x", (m, k))
    inputs["W"] = draw(f"{name}/W", (d, k), k**-0.5)
    if bias:
        inputs["bias"] = draw(f"{name}/bias", (d,))
    inputs["A"] = draw(f"{name}/A", (r, k), k**-0.5)
    B = draw(f"{name}/B", (d, r), r**-0.5)
    inputs["B"] = np.zeros_like(B) if fresh or sparse is not None else B
    if sparse is not None:
        inputs["B"][-1, -2:] = (0.0, sparse) if sparse else (1.0, -1.0)
    if lora_bias:
        inputs["bias_B"] = draw(f"{name}/bias_B", (d,))
    inputs["dy"] = draw(f"{name}/dy", (m, d))

    x, W, A, B, dy = (wide(inputs[n]) for n in ("x", "W", "A", "B", "dy"))
    b = wide(inputs["bias"]) if bias else None
    lora = LoRA(A, B, scale)
    y, h = _ref.lora_forward(x, W, b, lora, drop)
    dx, dA, dB = _ref.lora_backward(dy, x, h, W, lora, drop)
    rate = p or 0.0
    y_bound, h_bound = bounds.lora_forward(x, W, b, lora, p=rate)
    dx_bound, dA_bound, dB_bound = bounds.lora_backward(dy, x, h, W, lora, p=rate)
    if lora_bias:
        own = scale * wide(inputs["bias_B"])
        y = y + own
        y_bound = y_bound + bounds.gamma(4) * np.abs(own) + bounds.gamma(1) * np.abs(y)
        total, size = dy.sum(axis=0), np.abs(dy).sum(axis=0)
        case.expect(
            "dbias_B", scale * total, bounds.gamma(m + 2) * abs(scale) * size, RULE, spec=("B-5",)
        )
    back = tuple(s for s in spec if not s.startswith("F-") or s == "F-6")
    front = tuple(s for s in spec if not s.startswith("B-"))
    case.expect("h", h, h_bound, RULE, spec=front)
    case.expect("y", y, y_bound, RULE, spec=front)
    case.expect("g", dy @ B, bounds.matmul(dy, B), "bounds.matmul: gamma_d |dy| |B|", spec=back)
    case.expect("dx", dx, dx_bound, RULE, spec=back)
    case.expect("dA", dA, dA_bound, RULE, spec=back)
    case.expect("dB", dB, dB_bound + abs(scale) * np.abs(dy).T @ h_bound, RULE, spec=back)
    return case


def angles(head_dim: int, position: Array, theta: float = 10000.0) -> tuple[Array, Array]:
    """cos and sin [positions, head_dim/2] of these positions, float64."""
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.asarray(position, np.float64)[:, None] * frequency
    return np.cos(angle), np.sin(angle)
