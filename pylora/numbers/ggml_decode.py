"""The numbers in ggml's blocks, in NumPy: one function a type, blocks uint8 [n, size] to float32.

    Q4_0 Q4_1 Q5_0 Q5_1 Q8_0            32 numbers, a scale (and a minimum) of float16
    Q2_K Q3_K Q4_K Q5_K Q6_K            256 numbers in groups of 16 or 32, whose scales are numbers
                                        of 4 to 8 bits times one float16
    IQ4_NL IQ4_XS                       4-bit codes into a table of 16 numbers
    TQ1_0 TQ2_0                         -1, 0, 1: five in a byte, four in a byte
    MXFP4 NVFP4                         4-bit floats; a power of two for 32 of them, or a float of
                                        8 bits for 16

A result has the bits of `gguf.quants.dequantize`: the same float32 products in the same order. Not
here: IQ1_*, IQ2_* and IQ3_*, whose large tables the package gguf has (formats/gguf.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.types import Array

# IQ4's codes: closer together around 0.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
# MXFP4's: a sign, two bits of exponent, one of fraction, times 2.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _cut(blocks: Array, *sizes: int) -> list[Array]:
    """The fields of each block, contiguous; the last one is what is left."""
    ends = np.cumsum(sizes)
    return [np.ascontiguousarray(f) for f in np.split(blocks, ends, axis=1)]


def _half(field: Array) -> Array:
    """float16 [n, 2 bytes] -> float32 [n, 1]"""
    return field.view("<f2").astype(np.float32)


def _planes(field: Array, width: int, bits: int) -> Array:
    """Runs of `width` bytes, each byte several codes of `bits` bits: the lowest bits of a whole run
    are codes 0 .. width - 1, the next ones width .. 2 width - 1. uint8 [n, codes]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = field.reshape(len(field), -1, 1, width)
    return (runs >> shifts & np.uint8((1 << bits) - 1)).reshape(len(field), -1)


def _bit(field: Array) -> Array:
    """Bit i of the bytes as number i: uint8 [n, 8 bytes]"""
    return np.unpackbits(field, axis=1, bitorder="little")


def _spread(scales: Array, codes: Array) -> Array:
    """Codes [n, codes] as float32, in the groups that scales [n, groups] are of: [n, groups, .]"""
    return codes.reshape(*scales.shape, -1).astype(np.float32)


def _q4_0(blocks: Array) -> Array:
    d, q = _cut(blocks, 2)
    return _half(d) * (_planes(q, 16, 4).astype(np.float32) - np.float32(8))


def _q4_1(blocks: Array) -> Array:
    d, m, q = _cut(blocks, 2, 2)
    return _half(d) * _planes(q, 16, 4).astype(np.float32) + _half(m)


def _q5_0(blocks: Array) -> Array:
    d, high, q = _cut(blocks, 2, 4)
    code = _planes(q, 16, 4) | _bit(high) << 4
    return _half(d) * (code.astype(np.float32) - np.float32(16))


def _q5_1(blocks: Array) -> Array:
    d, m, high, q = _cut(blocks, 2, 2, 4)
    code = _planes(q, 16, 4) | _bit(high) << 4
    return _half(d) * code.astype(np.float32) + _half(m)


def _q8_0(blocks: Array) -> Array:
    d, q = _cut(blocks, 2)
    return q.view(np.int8).astype(np.float32) * _half(d)


def _q2_k(blocks: Array) -> Array:
    both, q, d, m = _cut(blocks, 16, 64, 2)
    scale = _half(d) * (both & 15).astype(np.float32)
    minimum = _half(m) * (both >> 4).astype(np.float32)
    values = scale[..., None] * _spread(scale, _planes(q, 32, 2)) - minimum[..., None]
    return values.reshape(len(blocks), -1)


def _q3_k(blocks: Array) -> Array:
    high, q, low_scale, high_scale, d = _cut(blocks, 32, 64, 8, 4)
    six = _planes(low_scale, 8, 4) | _planes(high_scale, 4, 2) << 4
    scale = _half(d) * (six.astype(np.float32) - np.float32(32))
    # A bit that is set means that 4 is not taken off.
    code = _planes(q, 32, 2).astype(np.float32) - np.float32(4) * (_planes(high, 32, 1) == 0)
    return (scale[..., None] * _spread(scale, code)).reshape(len(blocks), -1)


def _six_bits(field: Array) -> tuple[Array, Array]:
    """The eight scales and eight minima of 6 bits that Q4_K and Q5_K keep in 12 bytes."""
    a, b, c = field[:, :4], field[:, 4:8], field[:, 8:]
    scale = np.hstack([a & 63, c & 15 | a >> 2 & 48])
    minimum = np.hstack([b & 63, c >> 4 | b >> 2 & 48])
    return scale.astype(np.float32), minimum.astype(np.float32)


def _with_minima(d: Array, m: Array, packed: Array, code: Array) -> Array:
    scale, minimum = _six_bits(packed)
    scale, minimum = _half(d) * scale, _half(m) * minimum
    values = scale[..., None] * _spread(scale, code) - minimum[..., None]
    return values.reshape(len(code), -1)


def _q4_k(blocks: Array) -> Array:
    d, m, packed, q = _cut(blocks, 2, 2, 12)
    return _with_minima(d, m, packed, _planes(q, 32, 4))


def _q5_k(blocks: Array) -> Array:
    d, m, packed, high, q = _cut(blocks, 2, 2, 12, 32)
    return _with_minima(d, m, packed, _planes(q, 32, 4) | _planes(high, 32, 1) << 4)


def _q6_k(blocks: Array) -> Array:
    low, high, scales, d = _cut(blocks, 128, 64, 16)
    code = (_planes(low, 64, 4) | _planes(high, 32, 2) << 4).astype(np.float32) - np.float32(32)
    scale = _half(d) * scales.view(np.int8).astype(np.float32)
    return (scale[..., None] * _spread(scale, code)).reshape(len(blocks), -1)


def _iq4_nl(blocks: Array) -> Array:
    d, q = _cut(blocks, 2)
    return _half(d) * _IQ4[_planes(q, 16, 4)]


def _iq4_xs(blocks: Array) -> Array:
    d, high, low, q = _cut(blocks, 2, 2, 4)
    two = high.view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    four = np.stack([low & 15, low >> 4], axis=2).reshape(len(blocks), 8)
    scale = _half(d) * ((four | two.astype(np.uint8) << 4).astype(np.float32) - np.float32(32))
    return (scale[..., None] * _spread(scale, _IQ4[_planes(q, 16, 4)])).reshape(len(blocks), -1)


def _trits(field: Array, width: int, count: int) -> Array:
    """`count` digits of base 3 a byte, the first one on top of what the byte is of 256."""
    powers = np.array([3**i for i in range(count)], np.uint8)[:, None]
    shifted = (field.reshape(len(field), -1, 1, width) * powers).astype(np.uint16)  # modulo 256
    return (shifted * 3 >> 8).reshape(len(field), -1)


def _tq1_0(blocks: Array) -> Array:
    first, second, last, d = _cut(blocks, 32, 16, 4)
    code = np.hstack([_trits(first, 32, 5), _trits(second, 16, 5), _trits(last, 4, 4)])
    return _half(d) * (code.astype(np.float32) - np.float32(1))


def _tq2_0(blocks: Array) -> Array:
    q, d = _cut(blocks, 64)
    return _half(d) * (_planes(q, 32, 2).astype(np.float32) - np.float32(1))


def _mxfp4(blocks: Array) -> Array:
    e, q = _cut(blocks, 1)
    # 2^(e - 128), half of what the exponent says, as the codes are doubled; subnormal for 0 and 1.
    d = np.ldexp(np.float32(1), e.astype(np.int32) - 128).astype(np.float32)
    return d * _E2M1[_planes(q, 16, 4)]


def _nvfp4(blocks: Array) -> Array:
    e, q = _cut(blocks, 4)
    exponent, fraction = (e >> 3 & 15).astype(np.int32), (e & 7).astype(np.float32)
    normal = np.ldexp(np.float32(1) + fraction / np.float32(8), exponent - 8)
    d = np.where(exponent == 0, fraction * np.float32(2**-10), normal).astype(np.float32)
    d[e == 0x7F] = 0  # ggml's: no NaN
    return (d[..., None] * _spread(d, _E2M1[_planes(q, 8, 4)])).reshape(len(blocks), -1)


DECODERS: dict[str, Callable[[Array], Array]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
    "NVFP4": _nvfp4,
}
