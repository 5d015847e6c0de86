"""What laws that ask for equality on small integers allow: nothing, and for an implementation whose
precision does not hold small integers exactly (int8, int4) the bound of what it computes.

A law that compares several results adds up what each is allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

Allowed = Array | float


def forward(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with one adapter; `changed`: fields of the problem that are others in this call."""
    if t.exact:
        return 0.0
    q = p.replaced(**changed)
    lora = [(q.A, q.B, q.scale)]
    return bounds.forward(q.x, t.weight(q.W), lora, q.bias, precision=t.precision)


def base(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y without adapter."""
    return stacked(t, p, **{**changed, "adapters": []})


def stacked(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with several adapters at once."""
    if t.exact:
        return 0.0
    q = p.replaced(**changed)
    return bounds.forward(q.x, t.weight(q.W), q.adapters, q.bias, precision=t.precision)


def mixed(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with an adapter for each row."""
    return 0.0 if t.exact else mixed_bound(t, p.replaced(**changed))


def mixed_bound(t: Trial, p: Problem) -> Array:
    """The same, whatever the precision is."""
    W = t.weight(p.W)
    bound = bounds.forward(p.x, W, [], p.bias, precision=t.precision)
    for i, row in enumerate(p.rows):
        if row >= 0:
            x, lora = p.x[i : i + 1], [p.adapters[row]]
            bound[i] = bounds.forward(x, W, lora, p.bias, precision=t.precision)[0]
    return bound


def backward(t: Trial, p: Problem, **changed: Any) -> tuple[Allowed, Allowed, Allowed]:
    """Of dx, dA and dB."""
    if t.exact:
        return 0.0, 0.0, 0.0
    q = p.replaced(**changed)
    W = t.weight(q.W)
    return bounds.backward(q.dy, q.x, W, q.A, q.B, q.scale, precision=t.precision)


def at(bound: Allowed, rows: Any) -> Allowed:
    """Of these rows."""
    return bound if isinstance(bound, float) else np.asarray(bound)[rows]
