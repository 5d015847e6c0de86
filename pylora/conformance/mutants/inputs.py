"""What is done to the inputs: their strides, their sizes, and writing to them."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


def as_if_contiguous(a: Array) -> Array:
    """What a program sees that is given the array's address and shape but not its strides."""
    if a.flags.c_contiguous or a.size == 0:
        return a
    owner: Any = a
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    memory = owner.ravel(order="K")
    first = (a.ctypes.data - owner.ctypes.data) // a.itemsize
    return memory[(first + np.arange(a.size)) % memory.size].reshape(a.shape)


@wrong(
    "strides-ignored",
    "subtle",
    "Arrays are taken for contiguous whatever their strides.",
    "A pointer and a shape are passed on. Kernels of other operations had the same fault.",
    "ModelTC/LightLLM#1467",
)
class StridesIgnored(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        x, W, A, B = (as_if_contiguous(a) for a in (x, W, A, B))
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "row-stride-only",
    "subtle",
    "Of x the row stride is honoured, and columns are taken to lie side by side.",
    "ld is an argument of every BLAS; a stride between columns is not.",
)
class RowStrideOnly(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        rows = [as_if_contiguous(row) for row in x]
        x = np.stack(rows) if rows and x.strides[1] != x.itemsize else x
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "x-scaled-in-place",
    "subtle",
    "x is multiplied by the scale in place; the result is right, the caller's x is not.",
    "An allocation saved; a second backward pass reads the wrong x. There, dx was put into x.",
    "axolotl-ai-cloud/axolotl#3800",
)
class XScaledInPlace(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        if x.flags.writeable:
            with np.errstate(all="ignore"):
                x[...] = (self.widen(x) * self.widen(x).dtype.type(scale)).astype(x.dtype)
        return y


@wrong(
    "a-transposed-in-place",
    "subtle",
    "A is brought into the kernel's order in the caller's buffer.",
    "Right once; every later call, and the file that is saved, has another A.",
)
class ATransposedInPlace(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        if A.flags.writeable:
            A[...] = A.T.reshape(A.shape).copy()
        return y


@wrong(
    "read-only-refused",
    "subtle",
    "Read-only inputs raise an error.",
    "A binding asks for writable buffers that it never writes to; memory-mapped weights fail.",
)
class ReadOnlyRefused(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if not W.flags.writeable:
            raise ValueError("buffer source array is read-only")
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "no-rows-crash",
    "subtle",
    "An x of no rows raises an error.",
    "A division by the number of rows, or a grid of zero blocks.",
)
class NoRowsCrash(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if not x.shape[0]:
            raise ZeroDivisionError("integer division or modulo by zero")
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "one-row-squeezed",
    "subtle",
    "The result for one row has one axis.",
    "squeeze() was meant for another axis.",
)
class OneRowSqueezed(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return y[0] if y.shape[0] == 1 else y


@wrong(
    "dtype-widened",
    "subtle",
    "The result of bfloat16 inputs is float32.",
    "One operand is float32 and promotion does the rest: activations double in size.",
    "mflux-community/mflux#740",
)
class DtypeWidened(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return self.widen(super().forward(x, W, A, B, scale, bias))
