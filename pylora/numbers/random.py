"""Random numbers that any language can reproduce bit for bit.

Everything is a pure function of (seed, stream, element index); nothing has a state.

1.  Words: Philox 4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as
    1, 2, 3", 2011). The key is the 64-bit seed, the counter is (block, stream), low half first;
    word e of a stream is word e % 4 of block e // 4.
2.  Streams are named: `stream("init", path)` is the first 8 bytes, little-endian, of the SHA-256 of
    the parts joined by "/" in UTF-8.
3.  Element e takes the words w0 = 2e and w1 = 2e + 1: u = (floor(w0 / 64) * 2^26 + floor(w1 / 64)
    + 0.5) * 2^-52. That is exact in float64, never 0 or 1, and symmetric about one half.
4.  Uniform on (-b, b): (2u - 1) * b. Normal: std * z(u), with z the inverse normal distribution
    function by Wichura's algorithm AS 241 (PPND16, Applied Statistics 37, 1988).
5.  All arithmetic is float64 with +, -, *, / and sqrt alone, each rounded once (no fused
    multiply-add); the logarithm that z needs is `log` below. The result is rounded to float32 last.

This file does not do dropout: that is an operation of a backend, fed by the same words.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from pylora.errors import ConfigError
from pylora.numbers.philox import philox

Float64 = NDArray[np.float64]
_CHUNK = 1 << 16  # elements made at a time: bounds the memory, does not change the bits


def stream(*parts: str) -> int:
    """The 64-bit number of the stream with this name; it does not depend on the seed."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8], "little")


def check_seed(seed: object) -> int:
    """The seed as an int. ConfigError unless it is a whole number, 0 .. 2⁶⁴ - 1: of another one the
    generator would take a part, and two runs would be one."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed!r:.100}: a seed is a whole number, 0 to 2**64 - 1")
    return int(seed)


def unit(seed: int, stream: int, first: int, n: int) -> Float64:
    """Elements first .. first+n-1 of a stream, uniform on the open interval (0, 1); float64 [n]."""
    words = philox(seed, stream, 2 * first, 2 * n) >> np.uint32(6)
    pair = words.reshape(n, 2).astype(np.float64)
    u: Float64 = (pair[:, 0] * 2.0**26 + pair[:, 1] + 0.5) * 2.0**-52
    return u


def uniform(shape: tuple[int, ...], bound: float, *, seed: int, stream: int) -> NDArray[np.float32]:
    """float32 of `shape` (elements numbered row by row), uniform on (-bound, bound)."""
    seed, out = check_seed(seed), np.empty(math.prod(shape), np.float32)
    for first in range(0, out.size, _CHUNK):
        part = out[first : first + _CHUNK]
        part[:] = (unit(seed, stream, first, part.size) * 2.0 - 1.0) * bound
    return out.reshape(shape)


def normal(shape: tuple[int, ...], std: float, *, seed: int, stream: int) -> NDArray[np.float32]:
    """float32 of `shape` (elements numbered row by row), normal with mean 0 and deviation `std`."""
    seed, out = check_seed(seed), np.empty(math.prod(shape), np.float32)
    for first in range(0, out.size, _CHUNK):
        part = out[first : first + _CHUNK]
        part[:] = normal_quantile(unit(seed, stream, first, part.size)) * std
    return out.reshape(shape)


# ln 2 in two parts: the first has 21 trailing zero bits, so exponent * _LN2_HIGH is exact.
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")


def log(x: Float64) -> Float64:
    """The natural logarithm of positive normal float64, within 2 units in the last place.

    x = f 2^e with f in [sqrt(1/2), sqrt(2)) and s = (f - 1) / (f + 1); then
    log x = e ln 2 + 2 (s + s^3 / 3 + s^5 / 5 + ... + s^23 / 23), the odd series of 2 atanh s summed
    by Horner from the last term, the bracket as s + s * tail.
    """
    f, e = np.frexp(x)  # f in [1/2, 1): exact
    small = f < _SQRT_HALF
    f, e = np.where(small, f * 2.0, f), (e - small).astype(np.float64)
    s = (f - 1.0) / (f + 1.0)
    z = s * s
    tail = np.full_like(z, 1.0 / 23.0)
    for odd in range(21, 1, -2):
        tail = tail * z + 1.0 / odd
    y: Float64 = e * _LN2_HIGH + (e * _LN2_LOW + (s + s * (tail * z)) * 2.0)
    return y


# AS 241, PPND16: numerator and denominator of the three rational functions, constant term first.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
     1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
     3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
     5.2264952788528545610e3),
)  # fmt: skip
_MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
     1.05075007164441684324e-9),
)  # fmt: skip
_TAIL = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
     2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
     2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
     2.04426310338993978564e-15),
)  # fmt: skip


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Float64) -> Float64:
    """P(r) / Q(r), each by Horner's rule from the highest power."""
    values = []
    for polynomial in coefficients:
        value = np.full_like(r, polynomial[-1])
        for c in reversed(polynomial[:-1]):
            value = value * r + c
        values.append(value)
    ratio: Float64 = values[0] / values[1]
    return ratio


def normal_quantile(u: Float64) -> Float64:
    """z with P(Z <= z) = u for the standard normal Z; 0 < u < 1, about 1e-16 relative (AS 241)."""
    q = u - 0.5
    centre = np.abs(q) <= 0.425
    z = q * _ratio(_CENTRE, 0.180625 - q * q)
    # The branch not taken is given r = 1/4 so that it computes something harmless.
    r = np.sqrt(-log(np.where(centre, 0.25, np.where(q < 0, u, 1.0 - u))))
    outer = np.where(r <= 5.0, _ratio(_MIDDLE, r - 1.6), _ratio(_TAIL, r - 5.0))
    result: Float64 = np.where(centre, z, np.where(q < 0, -outer, outer))
    return result
