"""AWQ as AutoAWQ writes it ("gemm"): codes of 4 bits, a scale and a zero for each group of inputs.

    qweight   I32 [in, out / 8], packed along the outputs, in the order 0 2 4 6 1 3 5 7
    qzeros    I32 [groups, out / 8], alike
    scales    [groups, out]

A value is (code - zero) x scale, rounded to the dtype of the scales: the bits of AutoAWQ's
`dequantize_gemm`. Its other layouts (gemv, gemv_fast, marlin, exllama, llm-awq) are not read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.formats.base import Array
from pylora.formats.quantized.packed import unpack
from pylora.formats.quantized.parts import FLOATS, Parts, Spec

ENDINGS = ("qweight", "qzeros", "scales")
_EACH = 8  # numbers in a word
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each number is


def read(parts: Parts, group: int) -> Spec:
    """The weight that these tensors are; group: inputs of one scale, -1 all of them. Raises
    FileFormatError."""
    for ending in ("qweight", "qzeros", "scales"):
        parts.check(ending, FLOATS if ending == "scales" else ("i32",))
        if len(parts.shape(ending)) != 2 or not all(parts.shape(ending)):
            parts.fail(ending, f"has shape {parts.shape(ending)}; expected a matrix")
    k, words = parts.shape("qweight")
    d = words * _EACH
    size = k if group == -1 else group
    if k % size:
        parts.fail("qweight", f"has {k} inputs, which are no whole groups of {size}")
    dtype = parts.check("scales", FLOATS, (k // size, d))
    parts.check("qzeros", ("i32",), (k // size, words))

    def prepare() -> Callable[[int, int, int], Array]:
        codes = parts.array("qweight")
        zeros = _numbers(parts.array("qzeros")).astype(np.int16)
        scales = parts.floats("scales")

        def rows(_: int, i: int, j: int) -> Array:
            first, last = i // _EACH, -(-j // _EACH)
            q = _numbers(codes[:, first:last])[:, i - first * _EACH : j - first * _EACH]
            by_group = q.reshape(k // size, size, j - i)
            values = (by_group - zeros[:, None, i:j]).astype(np.float32)
            values *= scales[:, None, i:j]
            turned: Array = np.ascontiguousarray(values.reshape(k, j - i).T)
            return turned

        return rows

    return Spec((d, k), dtype, "awq-4", prepare)


def _numbers(words: Array) -> Array:
    """int32 [rows, n] to uint8 [rows, 8 n], in order."""
    codes = unpack(words, 4, words.shape[1] * _EACH).reshape(len(words), -1, _EACH)
    ordered: Array = codes[:, :, _PLACES].reshape(len(words), -1)
    return ordered
