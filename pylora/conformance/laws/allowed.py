"""What laws that ask for equality on small integers allow: nothing, where every sum is exact.

In float32 and float64 they are, by how the problems are made. In dtypes of 16 bits they are where
the magnitudes that are added up, in steps of the scale's last bit, stay within its digits, which
is computed here for each problem; elsewhere, and for an implementation whose precision does not
hold small integers exactly (int8, int4), the bound of what it computes is allowed.

A law that compares several results adds up what each is allowed, and widens them before it does
arithmetic of its own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

Allowed = Array | float
DIGITS = {"bfloat16": 8, "float16": 11}


def _step(scale: float) -> float:
    """The last bit of the scale if that is below 1: what all sums are multiples of."""
    if not scale or not math.isfinite(scale):
        return 1.0
    return 1.0 / float(scale).as_integer_ratio()[1]


def _size(a: Array) -> Array:
    return np.abs(np.asarray(a).astype(np.float64))


def _fits(like: Array, scales: list[float], *magnitudes: Array) -> bool:
    """Whether sums of such magnitudes are exact in the dtype of `like`, stored anywhere."""
    digits = DIGITS.get(bounds.kind(like))
    if digits is None:
        return True
    step = min([_step(s) for s in scales], default=1.0)
    top = max((float(a.max(initial=0)) for a in magnitudes), default=0.0)
    return top * max([1.0, *(abs(s) for s in scales)]) <= 2.0**digits * step


def forward(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with one adapter; `changed`: fields of the problem that are others in this call."""
    q = p.replaced(**changed)
    return stacked(t, q, adapters=[(q.A, q.B, q.scale)])


def base(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y without adapter."""
    return stacked(t, p, **{**changed, "adapters": []})


def stacked(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with several adapters at once."""
    q = p.replaced(**changed)
    if t.exact and bounds.kind(q.x) not in DIGITS:
        return 0.0
    if t.exact:
        X = _size(q.x)
        y = X @ _size(q.W).T + (0.0 if q.bias is None else _size(q.bias))
        scales, inner = [float(s) for _, _, s in q.adapters], [_size(q.W)]
        for A, B, s in q.adapters:
            h, up = X @ _size(A).T, _size(B).T
            y = y + max(1.0, abs(s)) * (h @ up)
            inner += h, up, _size(A).T @ up  # in place: there may be 98,307 adapters
        if _fits(q.x, scales, *inner, y / max([1.0, *(abs(s) for s in scales)])):
            return 0.0
    return bounds.forward(q.x, t.weight(q.W), q.adapters, q.bias, precision=t.precision)


def mixed(t: Trial, p: Problem, **changed: Any) -> Allowed:
    """Of y with an adapter for each row."""
    q = p.replaced(**changed)
    if t.exact and bounds.kind(q.x) not in DIGITS:
        return 0.0
    off = np.zeros((len(q.rows), q.W.shape[0]))
    for row in np.unique(q.rows):
        mine = q.rows == row
        adapters = [q.adapters[int(row)]] if row >= 0 else []
        off[mine] = stacked(t, q, x=q.x[mine], adapters=adapters)
    return off


def mixed_bound(t: Trial, p: Problem) -> Array:
    """The bound of the same, whether it is exact or not."""
    W = t.weight(p.W)
    bound = np.zeros((len(p.rows), W.shape[0]))
    for row in np.unique(p.rows):
        mine = p.rows == row
        lora = [p.adapters[int(row)]] if row >= 0 else []
        bound[mine] = bounds.forward(p.x[mine], W, lora, p.bias, precision=t.precision)
    return bound


def backward(t: Trial, p: Problem, **changed: Any) -> tuple[Allowed, Allowed, Allowed]:
    """Of dx, dA and dB."""
    q = p.replaced(**changed)
    if t.exact and bounds.kind(q.x) not in DIGITS:
        return 0.0, 0.0, 0.0
    if t.exact:
        D, X, A, B = _size(q.dy), _size(q.x), _size(q.A), _size(q.B)
        g, h, s = D @ B, X @ A.T, max(1.0, abs(float(q.scale)))
        sums = D @ _size(q.W) / s + g @ A, g.T @ X, D.T @ h, D.T @ X, B @ A, g, h, _size(q.W)
        if _fits(q.x, [float(q.scale)], *sums):
            return 0.0, 0.0, 0.0
    W = t.weight(q.W)
    return bounds.backward(q.dy, q.x, W, q.A, q.B, q.scale, precision=t.precision)


def merged(W: Array, A: Array, B: Array, scale: float) -> Allowed:
    """Of W' and of W after unmerging."""
    total = _size(W) + abs(float(scale)) * (_size(B) @ _size(A))
    if _fits(W, [float(scale)], _size(B) @ _size(A), total / max(1.0, abs(float(scale)))):
        return 0.0
    return bounds.unmerged(W, A, B, scale)


def merged_forward(t: Trial, p: Problem) -> Allowed:
    """Of y with the merged weight, against y with the adapter."""
    if bounds.kind(p.x) not in DIGITS and t.exact:
        return 0.0
    both: Array = bounds.merged_forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    total = _size(p.x) @ (_size(p.W) + abs(p.scale) * (_size(p.B) @ _size(p.A))).T
    if t.exact and _fits(p.x, [p.scale], total / max(1.0, abs(p.scale))):
        return 0.0
    return both


def at(bound: Allowed, rows: Any) -> Allowed:
    """Of these rows."""
    return bound if isinstance(bound, float) else np.asarray(bound)[rows]
