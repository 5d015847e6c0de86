"""The smallest adapter: forward alone, in plain NumPy. All else is reported as not tested.

PYTHONPATH=examples/conformance pylora conformance numpy_ten_lines:Plain
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Plain:
    name = "plain NumPy"
    dtypes = ("float32", "float64")

    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        y = x @ W.T + x.dtype.type(scale) * ((x @ A.T) @ B.T)
        return y if bias is None else y + bias

    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        g, s = dy @ B, x.dtype.type(scale)
        return dy @ W + s * (g @ A), s * (g.T @ x), s * (dy.T @ (x @ A.T))

    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return W + W.dtype.type(scale) * (B @ A)

    def unmerge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return W - W.dtype.type(scale) * (B @ A)


if __name__ == "__main__":
    from pylora.conformance.running.report import text
    from pylora.conformance.running.runner import run

    report = run(Plain)
    print(text(report))
    # Merging back and forth in floating point is within a bound, and not exact: that is reported.
    assert np.all([o.status != "BROKEN" for o in report.outcomes])
