"""A law of what NaN and infinity leave alone: everything that is not computed from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.sizes import has
from pylora.conformance.problems import sizes
from pylora.conformance.problems.layers import DTYPES, exact_problems, st
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

ODD = (np.nan, np.inf, -np.inf)
NAMES = ("x", "W", "A", "B", "dy")


def _with_odd(dtype: str) -> Any:
    return st.builds(
        lambda p, name, value, at: p.replaced(name=name, value=value, at=at),
        exact_problems(dtype, tokens=(2, 3, 5), features=(2, 3, 4, 7), ranks=(1, 2, 3)),
        st.sampled_from(NAMES),
        st.sampled_from(ODD),
        st.integers(0, 2**16),
    )


def _each(dtype: str, examples: int) -> Iterator[Problem]:
    """Each number in each array, at its start and its end."""
    for name in NAMES:
        for value in ODD:
            for at in (0, -1):
                p = sizes.layer(dtype, 1, m=3, k=4, d=3, r=2)
                yield p.replaced(name=name, value=value, at=at)


def _elsewhere(t: Trial, p: Problem) -> None:
    a = getattr(p, p.name).copy()
    a.reshape(-1)[p.at % a.size] = p.value
    q, where = p.replaced(**{p.name: a}), f"with {p.value} in {p.name}"
    W = t.weight(p.W) if p.name != "W" else q.W
    if p.name != "W" or t.precision == "fp32":
        if p.name != "dy":
            y = t.forward(q.x, q.W, q.A, q.B, q.scale, q.bias)
            want = oracle.forward(q.x, W, [(q.A, q.B, q.scale)], q.bias)
            _clean(t, f"y {where}", y, want, allowed.forward(t, p))
        if has(t, "backward"):
            got = t.backward(q.dy, q.x, q.W, q.A, q.B, q.scale)
            wants = oracle.backward(q.dy, q.x, W, q.A, q.B, q.scale)
            for part in zip(("dx", "dA", "dB"), got, wants, allowed.backward(t, p)):
                _clean(t, f"{part[0]} {where}", *part[1:])
    if has(t, "merge") and p.name in ("W", "A", "B"):
        merged = t.merge(q.W, q.A, q.B, q.scale)
        merged = merged[0] if isinstance(merged, tuple) else merged
        want, off = oracle.merged(q.W, q.A, q.B, q.scale), allowed.merged(p.W, p.A, p.B, p.scale)
        _clean(t, f"W' {where}", merged, want, off)


def _clean(t: Trial, what: str, got: Array, want: Array, bound: allowed.Allowed) -> None:
    """Only what the formula leaves finite is looked at."""
    at = np.nonzero(np.isfinite(np.asarray(want, np.float64)))
    limit = bound if isinstance(bound, float) else np.broadcast_to(bound, want.shape)[at]
    t.expect(f"{what}, where it does not reach,", got, want[at], limit, at=at)


LAWS = (
    Law(
        "F21",
        "What is not computed from NaN or infinity is as ever.",
        "one element of x, W, A, B or dy is NaN or ±inf: y, dx, dA, dB, W' are exact wherever the "
        "formula is finite",
        "a whole tile, row or tensor is given up because of one number, or answered otherwise",
        ("N-5", "F-7"),
        ("forward",),
        _with_odd,
        _elsewhere,
        (),
        dtypes=DTYPES,
        covering=_each,
    ),
)
