"""The NumPy backend: the reference operations on NumPy arrays, in float32 or float64.

It is the oracle and the fallback, not the fast path. It also takes complex128, so that gradients
can be checked by complex step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.errors import DtypeError, ShapeError
from pylora.reference import Reference

_DTYPES = (np.float32, np.float64, np.complex128)


class NumpyBackend(Reference):
    """`Reference` over NumPy. A "packed" weight is the array itself, made read-only."""

    name = "numpy"

    def __init__(self) -> None:
        super().__init__(np)

    def pack(self, W: np.ndarray) -> np.ndarray:
        """W [d,k] as a read-only C-contiguous array: a view where W is contiguous already, so the
        caller gives W away."""
        if W.ndim != 2:
            raise ShapeError(f"a weight to pack must be [d, k], got shape {W.shape}")
        packed: np.ndarray = self.asarray(W).view()
        packed.flags.writeable = False
        return packed

    def unpack(self, P: np.ndarray) -> np.ndarray:
        W: np.ndarray = P.copy()
        return W

    def asarray(self, a: Any) -> np.ndarray:
        """A C-contiguous array of a; DtypeError unless float32, float64 or complex128."""
        array = np.asarray(a, order="C")
        if array.dtype.type not in _DTYPES:
            raise DtypeError(
                f"the numpy backend computes in float32 or float64, got {array.dtype}; "
                "convert the array first"
            )
        return array

    def to_numpy(self, a: np.ndarray) -> np.ndarray:
        return a

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return np.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return np.zeros(shape, dtype)
