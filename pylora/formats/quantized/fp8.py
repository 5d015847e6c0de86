"""FP8: eight-bit floats with scales: of blocks (DeepSeek, Qwen3-FP8), of a tensor, of each row.

    weight             F8_E4M3 or F8_E5M2 [out, in]
    weight_scale_inv   of blocks [out / 128, in / 128], the last ones cut short; or of the tensor
    weight_scale       of the tensor, or of each row: [1], [out, 1]
    input_scale, activation_scale    what engines round activations with: nothing here does

A value is weight x scale in float32, rounded to the dtype that config.json gives the model: the
bits of transformers' `Fp8Dequantize`. Experts that are stacked have a scale behind their own name,
`experts.gate_up_proj_scale_inv`. Four-bit floats in such a file are not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pylora.formats.base import Array, Shape
from pylora.formats.quantized.parts import Parts, Spec

ENDINGS = (
    "weight_scale_inv",
    "weight_scale",
    "activation_scale",
    "input_scale_ub",
    "input_scale",
)
_KINDS = ("f8_e4m3", "f8_e5m2")


def _e4m3() -> Array:
    """The 256 numbers: a sign, four bits of exponent, three of fraction; no infinity, one NaN."""
    code = np.arange(128)
    exponent, fraction = code >> 3, (code & 7).astype(np.float64)
    values = np.where(
        exponent == 0, fraction * 2.0**-9, (1 + fraction / 8) * 2.0 ** (exponent - 7.0)
    )
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


VALUES = {
    "f8_e4m3": _e4m3(),
    # The first byte of a float16.
    "f8_e5m2": (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32),
}


def scale(parts: Parts, ending: str) -> Array:
    """Scales as float32, of any shape; of F8_E8M0 the power of two that each byte stands for."""
    if parts.dtype(ending) != "f8_e8m0":
        return parts.floats(ending)
    codes = parts.bytes(ending)
    if (codes == 255).any():
        parts.fail(ending, "has numbers that are NaN; the file is damaged")
    powers: Array = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    return powers.reshape(parts.shape(ending))


def grid(parts: Parts, ending: str, shape: Shape, block: tuple[int, int] | None) -> tuple[int, int]:
    """The rows and columns that one scale of a tensor of `shape` is for. FileFormatError where the
    scales are of no such form."""
    (d, k), found = shape[-2:], parts.shape(ending)
    if math.prod(found) == math.prod(shape[:-2]):
        return d, k
    if block is not None and found == (*shape[:-2], -(-d // block[0]), -(-k // block[1])):
        return block
    if found in (shape[:-1], (*shape[:-1], 1)):
        return 1, k
    blocks = f"of blocks of {block[0]} x {block[1]}, " if block is not None else ""
    parts.fail(
        ending, f"has shape {found}; a weight {shape} has scales {blocks}of a row or of the tensor"
    )


def read(parts: Parts, dtype: str, block: tuple[int, int] | None) -> Spec:
    """The weight that these tensors are, in `dtype`. Raises FileFormatError."""
    ending = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
    if parts.dtype("weight") in ("i8", "u8"):
        parts.fail("weight", "has floats of 4 bits, which are not read")
    kind, shape = parts.check("weight", _KINDS), parts.shape("weight")
    if len(shape) not in (2, 3) or not all(shape):
        parts.fail("weight", f"has shape {shape}; expected [out, in] or [experts, a, b]")
    high, wide = grid(parts, ending, shape, block)
    d, k = shape[-2:]

    def prepare() -> Callable[[int, int, int], Array]:
        codes = parts.bytes("weight").reshape(-1, d, k)
        scales = scale(parts, ending).reshape(len(codes), -(-d // high), -(-k // wide))
        table = VALUES[kind]

        def rows(e: int, i: int, j: int) -> Array:
            values = table[codes[e, i:j]]
            values *= spread(scales[e], i, j, high, wide, k)
            return values

        return rows

    return Spec(shape, dtype, "fp8", prepare)


def spread(scales: Array, i: int, j: int, high: int, wide: int, k: int) -> Array:
    """The scales [blocks, blocks] of rows i to j, one for each number or for each row."""
    own = scales[np.arange(i, j) // high]
    return own if own.shape[1] == 1 else np.repeat(own, wide, axis=1)[:, :k]
