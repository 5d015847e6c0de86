"""The NumPy backend: the reference operations on NumPy arrays, in float32 or float64.

It is the oracle and the fallback, not the fast path. It also takes complex128, so that gradients
can be checked by complex step. Of a precision it has the weights' values; it rounds nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.errors import DtypeError, ShapeError
from pylora.numbers.precision import (
    BF16,
    Stored,
    check_precision,
    from_bf16,
    to_bf16,
    weights_of,
)
from pylora.reference import Reference

_DTYPES = (np.float32, np.float64, np.complex128)
_QUANTIZED = {"int8": "q8_0", "int4": "q4_1"}  # how a precision stores a float source


class PackedArray:
    """A frozen weight [d, k]: the values that its precision keeps, in a read-only array."""

    def __init__(self, values: np.ndarray, precision: str) -> None:
        self.values = values
        self.values.flags.writeable = False
        self.precision = precision
        self.shape: tuple[int, int] = values.shape
        self.dtype, self.nbytes = values.dtype, values.nbytes

    def __repr__(self) -> str:
        return f"PackedArray([{self.shape[0]}, {self.shape[1]}], {self.precision})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)


class NumpyBackend(Reference):
    """`Reference` over NumPy."""

    name = "numpy"
    head_rows = 128
    bitwise = True  # a row has the same bits whatever rows are beside it

    def __init__(self) -> None:
        super().__init__(np)

    # ---- precision ----------------------------------------------------------------------------

    def computes(self, precision: str) -> str:
        """The precision whose values a model of this one has here: "fp32x3" is plain float32."""
        return "fp32" if check_precision(precision) == "fp32x3" else precision

    def activation_dtype(self, precision: str) -> Any:
        """The dtype of arrays that only feed products; None: the computation's own, as here."""
        check_precision(precision)

    def pack(self, W: np.ndarray | Stored, precision: str = "fp32") -> PackedArray:
        """The values that `precision` keeps of W [d,k], or those of a stored weight. In fp32 it is
        a view where W is C-contiguous, so the caller gives W away."""
        precision = self.computes(precision)
        if len(W.shape) != 2:
            raise ShapeError(f"a weight to pack must be [d, k], got shape {W.shape}")
        return PackedArray(self._kept(W, precision).view(), precision)

    def _kept(self, W: np.ndarray | Stored, precision: str) -> np.ndarray:
        if isinstance(W, Stored):
            values: np.ndarray
            if W.kind == "bf16":
                values = from_bf16(W.rows.view(BF16))
            else:
                from pylora.numbers.quantize import dequantize

                values = dequantize(W)
            if weights_of(precision) in _QUANTIZED and W.kind != "bf16":
                return values
            W = values
        array = self.asarray(W)
        if precision == "fp32":
            return array
        narrow = array.real.astype(np.float32)
        if precision == "fp16":
            with np.errstate(over="ignore"):
                return narrow.astype(np.float16).astype(array.dtype)
        if precision == "bf16":
            return from_bf16(to_bf16(narrow)).astype(array.dtype)
        from pylora.numbers.quantize import dequantize, quantize

        kept: np.ndarray = dequantize(quantize(narrow, _QUANTIZED[weights_of(precision)]))
        return kept.astype(array.dtype)

    def unpack(self, P: PackedArray) -> np.ndarray:
        W: np.ndarray = P.values.copy()
        return W

    # ---- arrays -------------------------------------------------------------------------------

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

    def place(self, a: np.ndarray) -> np.ndarray:
        """The array where this backend computes: itself. On a GPU, a copy of a host's array."""
        return a

    def check_room(self, nbytes: int) -> None:
        """Raises for a model whose weights of so many bytes cannot fit: on GPUs alone."""

    def assign(self, a: np.ndarray, values: np.ndarray) -> None:
        """Writes a host's values into an array of this backend, of the same shape and dtype."""
        a[...] = values

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return np.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        return np.zeros(shape, dtype)
