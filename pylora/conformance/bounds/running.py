"""Running error analysis as an arithmetic: each number carries a bound of its own error.

`Running(value, error)` is an array computed exactly (float64) together with how far a computation
in unit roundoff u may be from it (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd
ed., sect. 3.3; the error of a sum of n terms in any order is gamma_n of the magnitudes, 3.5). It is
used where a chain of operations is too long to count by hand: the attention block and its backward.

In bfloat16 and float16 sums are accumulated in float32 and each result is stored in 16 bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from pylora.conformance.bounds.ops import EXP, gamma, tiny, unit
from pylora.types import Array


class Running:
    """value [any shape], float64, and the bound `error` of a computation in `dtype`."""

    __array_ufunc__ = None  # so that ndarray * Running comes to Running

    def __init__(self, value: Any, error: Any = 0.0, dtype: Any = np.float32) -> None:
        self.value = np.asarray(value, np.float64)
        error = np.asarray(error, np.float64)
        self.known = error.ndim == 0 and not error  # exactly: products with it are fewer
        same = error.shape == self.value.shape
        self.error = error if same else np.broadcast_to(error, self.value.shape)
        self.dtype = dtype
        self.u, self.tiny, self.narrow = _of_dtype(dtype)
        self.sums = np.float32 if self.narrow else dtype  # what sums are accumulated in

    def _with(self, value: Array, error: Array) -> Running:
        """Of the same dtype; both float64 and of one shape, which is not looked at again: there are
        a hundred operations in a block, most of a few numbers."""
        new = object.__new__(Running)
        new.value, new.error, new.known = value, error, False
        new.dtype, new.u, new.tiny = self.dtype, self.u, self.tiny
        new.narrow, new.sums = self.narrow, self.sums
        return new

    def _of(self, value: Array, error: Array, roundings: float = 1) -> Running:
        relative = _gamma(roundings, self.sums)
        if self.narrow:
            relative += _gamma(1, self.dtype)
        return self._with(value, error + (relative * (np.abs(value) + error) + self.tiny))

    def _other(self, other: Any) -> Running:
        return other if isinstance(other, Running) else Running(other, 0.0, self.dtype)

    def __add__(self, other: Any) -> Running:
        o = self._other(other)
        return self._of(self.value + o.value, self.error + o.error)

    def __sub__(self, other: Any) -> Running:
        o = self._other(other)
        return self._of(self.value - o.value, self.error + o.error)

    def __mul__(self, other: Any) -> Running:
        o = self._other(other)
        if o.known:
            error = 0.0 if self.known else self.error * np.abs(o.value)
        elif self.known:
            error = np.abs(self.value) * o.error
        else:
            error = np.abs(self.value) * o.error + self.error * (np.abs(o.value) + o.error)
        return self._of(self.value * o.value, np.asarray(error))

    def __matmul__(self, other: Any) -> Running:
        o = self._other(other)
        a, b, n = np.abs(self.value), np.abs(o.value), self.value.shape[-1]
        size: Any = a @ b
        error: Any = 0.0  # (a + their error) (b + theirs) - a b
        if not o.known:
            error = a @ o.error
        if not self.known:
            error = error + self.error @ (b if o.known else b + o.error)
        error = error + _gamma(max(n, 1), self.sums) * (size + error) + 2 * n * self.tiny
        return self._stored(self.value @ o.value, error)

    def exp(self) -> Running:
        """exp of a value <= 0 (or near it): a factor exp(±error), and the function's own error."""
        value = np.exp(self.value)
        return self._of(value, value * np.expm1(self.error), EXP)

    def sum(self) -> Running:
        """Over the last axis, which stays with length 1."""
        n = self.value.shape[-1]
        value = self.value.sum(axis=-1, keepdims=True)
        size = (np.abs(self.value) + self.error).sum(axis=-1, keepdims=True)
        error = self.error.sum(axis=-1, keepdims=True) + _gamma(n, self.sums) * size
        return self._stored(value, error + n * self.tiny)

    def _stored(self, value: Array, error: Array) -> Running:
        """A sum as it is stored: rounded once more where the dtype is narrower than the sum."""
        return self._of(value, error, 0) if self.narrow else self._with(value, error)

    def softmax(self) -> Running:
        """Over the last axis, of values of which the largest is 0.

        With scores off by e each, P is off by a factor of at most exp(e) / sum P exp(-e), and by
        no more than takes it to 0 or 1: a score that is hardly known does not void the bound. The
        function, a sum of n and a quotient are 2 EXP + n + 2 roundings."""
        n = self.value.shape[-1]
        P = np.exp(self.value)
        P = P / P.sum(axis=-1, keepdims=True)
        e = np.minimum(self.error, 50.0)  # a factor of e⁵⁰ says nothing anyway
        off = np.exp(e) / (P * np.exp(-e)).sum(axis=-1, keepdims=True) - 1
        error = np.minimum(P * off, np.maximum(P, 1 - P)) + n * self.tiny
        return self._of(P, error, 2 * EXP + n + 2)

    def wider(self, other: Running) -> Running:
        """The same value with the sum of both errors: for two ways to compute it."""
        return self._with(self.value, self.error + other.error)

    def __getitem__(self, at: Any) -> Running:
        if self.known:
            return Running(self.value[at], 0.0, self.dtype)
        return self._with(self.value[at], self.error[at])

    @property
    def T(self) -> Running:
        if self.known:
            return Running(self.value.T, 0.0, self.dtype)
        return self._with(self.value.T, self.error.T)

    @property
    def mT(self) -> Running:
        """The last two axes exchanged."""
        error = 0.0 if self.known else np.swapaxes(self.error, -1, -2)
        return Running(np.swapaxes(self.value, -1, -2), error, self.dtype)


@cache
def _of_dtype(dtype: Any) -> tuple[float, float, bool]:
    """u, the smallest normal number, and whether sums are wider."""
    return unit(dtype), tiny(dtype), str(dtype) in ("bfloat16", "float16")


@cache
def _gamma(n: float, dtype: Any) -> float:
    return gamma(n, dtype)


def join(parts: list[Running], axis: int) -> Running:
    """np.concatenate."""
    value = np.concatenate([p.value for p in parts], axis)
    return Running(value, np.concatenate([p.error for p in parts], axis), parts[0].dtype)
