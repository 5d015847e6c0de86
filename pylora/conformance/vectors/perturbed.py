"""Bounds of compositions, where the errors of one operation pass through the next.

They are found by running the float64 reference again and again with each operation's result moved,
up or down at random, by the full bound that `bounds_ops` gives for it (Monte Carlo arithmetic:
Parker, UCLA CSD-970002, 1997). To first order the effects add up, so 6 times their root mean square
bounds a computation whose roundings are independent, but for a chance of 2 exp(-18) (Hoeffding; see
Higham & Mary, SIAM J. Sci. Comput. 41(5), 2019). The random signs are Philox words: the same each
time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.backends.numpy import NumpyBackend
from pylora.conformance.bounds import ops as bounds
from pylora.conformance.vectors.cases import Case
from pylora.ops.protocol import Backend
from pylora.types import Array, LoRA

RUNS = 8  # perturbed repetitions
SIGMAS = 6.0
RULE = "6 rms of 8 runs with every operation off by its bound at random (perturbed.py)"


class Perturbed(NumpyBackend):
    """The reference with every float result moved by plus or minus its float32 bound."""

    def __init__(self, run: int) -> None:
        super().__init__()
        self.run, self.calls = run, 0

    def _move(self, value: Any, bound: Any) -> Any:
        if value is None:
            return None
        self.calls += 1
        words = self.philox(self.run, self.calls, 0, value.size).reshape(value.shape)
        return value + np.where(words & 1, 1.0, -1.0) * bound

    def lora_forward(self, x, W, bias=None, lora=None, drop=None, residual=None, dtype=None):  # type: ignore[no-untyped-def]
        y, h = super().lora_forward(x, W, bias, lora, drop, residual)
        p = drop.p if drop else 0.0
        y_bound, h_bound = bounds.lora_forward(x, W, bias, lora, residual, p=p)
        return self._move(y, y_bound), self._move(h, h_bound)

    def lora_backward(self, dy, x, h, W, lora=None, drop=None, *, add=None, **need):  # type: ignore[no-untyped-def]
        dx, dA, dB = super().lora_backward(dy, x, h, W, lora, drop, add=add, **need)
        if lora is None:
            none = LoRA(np.zeros((0, W.shape[1])), np.zeros((W.shape[0], 0)), 1.0)
            x, h, lora = np.zeros((len(dy), W.shape[1])), np.zeros((len(dy), 0)), none
        if W is None:
            W = np.zeros((lora.B.shape[0], lora.A.shape[1]))
        p = drop.p if drop else 0.0
        limits = bounds.lora_backward(dy, x, h, W, lora, add, p=p)
        return tuple(self._move(a, b) for a, b in zip((dx, dA, dB), limits))

    def rms_norm_forward(self, x, w, eps, dtype=None):  # type: ignore[no-untyped-def]
        y, rstd = super().rms_norm_forward(x, w, eps)
        y_bound, rstd_bound = bounds.rms_norm_forward(x, w, eps)
        return self._move(y, y_bound), self._move(rstd, rstd_bound)

    def rms_norm_backward(self, dy, x, w, rstd, add=None, need_dw=False):  # type: ignore[no-untyped-def]
        dx, dw = super().rms_norm_backward(dy, x, w, rstd, add, need_dw)
        return self._move(dx, bounds.rms_norm_backward(dy, x, w, rstd, add)[0]), dw

    def rope(self, x, cos, sin, position, head_dim, layout="half", inverse=False, dtype=None):  # type: ignore[no-untyped-def]
        y = super().rope(x, cos, sin, position, head_dim, layout, inverse)
        return self._move(y, 2 * bounds.rope(x, head_dim))  # twice: the tables are rounded too

    def attention_forward(self, q, k, v, seqs, attn, dtype=None):  # type: ignore[no-untyped-def]
        o, lse = super().attention_forward(q, k, v, seqs, attn)
        o_bound, lse_bound = bounds.attention_forward(q, k, v, seqs, attn)
        return self._move(o, o_bound), self._move(lse, lse_bound)

    def attention_backward(self, do, q, k, v, o, lse, seqs, attn, dtype=None):  # type: ignore[no-untyped-def]
        grads = super().attention_backward(do, q, k, v, o, lse, seqs, attn)
        limits = bounds.attention_backward(do, q, k, v, o, lse, seqs, attn)
        return tuple(self._move(a, b) for a, b in zip(grads, limits))

    def swiglu_forward(self, gate, up, dtype=None):  # type: ignore[no-untyped-def]
        return self._move(super().swiglu_forward(gate, up), bounds.swiglu_forward(gate, up))

    def swiglu_backward(self, dy, gate, up, dtype=None):  # type: ignore[no-untyped-def]
        grads, limits = super().swiglu_backward(dy, gate, up), bounds.swiglu_backward(dy, gate, up)
        return tuple(self._move(a, b) for a, b in zip(grads, limits))

    def cross_entropy_forward(self, logits, labels):  # type: ignore[no-untyped-def]
        nll, lse = super().cross_entropy_forward(logits, labels)
        nll_bound, lse_bound = bounds.cross_entropy_forward(logits, labels)
        return self._move(nll, nll_bound), self._move(lse, lse_bound)

    def cross_entropy_backward(self, logits, labels, lse, weight, overwrite=False):  # type: ignore[no-untyped-def]
        d = super().cross_entropy_backward(logits, labels, lse, weight)
        return self._move(d, bounds.cross_entropy_backward(logits, labels, lse, weight))

    def adamw_step(self, param, grad, m, v, o):  # type: ignore[no-untyped-def]
        limits = bounds.adamw_step(param, grad, m, v, o)
        super().adamw_step(param, grad, m, v, o)
        for array, limit in zip((param, m, v), limits):
            array[...] = self._move(array, limit)
        np.maximum(v, 0, out=v)


def expect_all(case: Case, compute: Callable[[Backend], Mapping[str, Array]]) -> None:
    """Expects everything that `compute` returns, within the bound that the file's header says."""
    values = compute(NumpyBackend())
    square = {name: np.zeros(np.shape(value)) for name, value in values.items()}
    for run in range(RUNS):
        for name, value in compute(Perturbed(run)).items():
            square[name] += (value - values[name]) ** 2 / RUNS
    for name, value in values.items():
        rounding = bounds.unit() * np.abs(value) + bounds.tiny()
        case.expect(name, value, SIGMAS * np.sqrt(square[name]) + rounding, RULE)
