"""Lengths of rows, in float64 and in one order of summation, whatever asks for them.

DoRA starts from the lengths of W's rows and divides by them: the same function gives both, so that
a fresh adapter's quotient is exactly 1. Plain and exact enough to be the measure of faster ways.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_BYTES = 1 << 24  # of float64 that exist at a time


def row_squares(
    W: Array, A: Array | None = None, B: Array | None = None, scale: float = 1.0
) -> Array:
    """Σ_q V[j,q]² of V = W + scale B A, float64 [d]: W [d,k], A [r,k], B [d,r] of any real dtype.

    Each element of V is summed over the rank in order; a row's bits depend on that row alone.
    """
    d, k = W.shape
    out = np.empty(d, np.float64)
    step = max(1, _BYTES // (8 * max(k, 1)))
    wide = None if A is None else np.ascontiguousarray(A, np.float64)
    for i in range(0, d, step):
        V = np.array(W[i : i + step], np.float64, order="C")
        if wide is not None and B is not None:
            rows = B[i : i + step].astype(np.float64)
            t = np.zeros_like(V)
            for p in range(wide.shape[0]):
                t += rows[:, p : p + 1] * wide[p : p + 1]
            V += scale * t
        out[i : i + step] = (V * V).sum(axis=1)
    return out
