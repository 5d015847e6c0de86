"""Golden vectors of DoRA (spec W): lengths, forward, backward and merging of one layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import weighted as bounds
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.ops import draw, wide
from pylora.reference import Reference
from pylora.types import Array, LoRA

_ref = Reference()
_RULE = "bounds.weighted: the formula's own, and what n may be off by (W-6)"


def cases() -> list[Case]:
    """All cases of this file."""
    return [
        _dora("dora", ("W-1", "W-3", "W-5", "W-6")),
        _dora("dora-bias", ("W-1",), bias=True),
        _dora("dora-negative", ("W-1", "W-3"), scale=-0.75),
        _dora("dora-fresh", ("W-2",), fresh=True),
        _dora("dora-row-of-zeros", ("W-4",), zero=2, bias=True),
        _dora("dora-rank-above-sizes", ("W-1", "W-6"), r=9),
        _dora("dora-one-token", ("W-3",), m=1),
        _dora("dora-beyond-tiles", ("W-1", "W-3", "W-5"), m=9, d=34, k=33, r=5, scale=0.25),
    ]


def _dora(
    name: str,
    spec: tuple[str, ...],
    *,
    m: int = 5,
    d: int = 7,
    k: int = 6,
    r: int = 3,
    scale: float = 2.0,
    bias: bool = False,
    fresh: bool = False,
    zero: int | None = None,
) -> Case:
    """`fresh`: B = 0 and m = n; `zero`: this row of W + s B A is zeros, and so is its m."""
    case = Case(name, "dora", spec, {"scale": scale})
    x, dy = draw(f"{name}/x", (m, k)), draw(f"{name}/dy", (m, d))
    W, A = draw(f"{name}/W", (d, k), k**-0.5), draw(f"{name}/A", (r, k), k**-0.5)
    B = np.zeros((d, r), np.float32) if fresh else draw(f"{name}/B", (d, r), 0.3)
    if zero is not None:
        W[zero], B[zero] = 0, 0
    low = LoRA(wide(A), wide(B), scale)
    n = _ref.row_norms(wide(W), low)
    turns = np.ones(d) if fresh else 1 + 0.4 * wide(draw(f"{name}/m", (d,)))
    magnitude = (n * turns).astype(np.float32)
    case.inputs |= {"x": x, "W": W, "A": A, "B": B, "magnitude": magnitude, "dy": dy}
    if bias:
        case.inputs["bias"] = draw(f"{name}/bias", (d,))
    _expect(case, W, LoRA(low.A, low.B, scale, magnitude=wide(magnitude), norm=n), x, dy)
    return case


def _expect(case: Case, W: Array, lora: LoRA, x: Array, dy: Array) -> None:
    i, s = case.inputs, lora.scale
    A, B, m, bias = i["A"], i["B"], i["magnitude"], i.get("bias")
    wide_bias = None if bias is None else wide(bias)
    y, h, v = _ref.dora_forward(wide(x), wide(W), wide_bias, lora)
    dx, dA, dB, dm = _ref.dora_backward(wide(dy), wide(x), h, v, wide(W), lora)
    case.expect("n", lora.norm, bounds.norm(W, A, B, s), _RULE, spec=("W-6",))
    case.expect("y", y, bounds.forward(x, W, A, B, m, s, bias), _RULE)
    off: Any = bounds.backward(dy, x, W, A, B, m, s)
    for name, value, bound in zip(("dx", "dA", "dB", "dm"), (dx, dA, dB, dm), off, strict=True):
        case.expect(name, value, bound, _RULE, spec=("W-3", *case.spec[:1]))
    n: Any = lora.norm
    f = np.where(n == 0, 1.0, wide(m) / np.where(n == 0, 1.0, n))
    merged = f[:, None] * (wide(W) + s * lora.B @ lora.A)
    case.expect("merged", merged, bounds.merged(W, A, B, m, s), _RULE, spec=("W-5",))
