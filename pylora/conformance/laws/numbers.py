"""The random numbers of docs/random.md once more, an element at a time, in Python's own integers
and floats: written from that page and not from pylora/numbers, so that a fault there is seen."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from pylora.types import Array

_WORD = 2**32
_TAIL_TERMS = range(21, 1, -2)
_CENTRE = (
    (3.3871328727963666, 133.14166789178438, 1971.5909503065513, 13731.69376550946,
     45921.95393154987, 67265.7709270087, 33430.57558358813, 2509.0809287301227),
    (1.0, 42.31333070160091, 687.1870074920579, 5394.196021424751,
     21213.794301586597, 39307.89580009271, 28729.085735721943, 5226.495278852854),
)  # fmt: skip
_SECOND = (
    (1.4234371107496835, 4.630337846156546, 5.769497221460691, 3.6478483247632045,
     1.2704582524523684, 0.2417807251774506, 0.022723844989269184, 0.0007745450142783414),
    (1.0, 2.053191626637759, 1.6763848301838038, 0.6897673349851,
     0.14810397642748008, 0.015198666563616457, 0.0005475938084995345, 1.0507500716444169e-09),
)  # fmt: skip
_THIRD = (
    (6.657904643501103, 5.463784911164114, 1.7848265399172913, 0.29656057182850487,
     0.026532189526576124, 0.0012426609473880784, 2.7115555687434876e-05, 2.0103343992922881e-07),
    (1.0, 0.599832206555888, 0.1369298809227358, 0.014875361290850615,
     0.0007868691311456133, 1.8463183175100548e-05, 1.421511758316446e-07, 2.0442631033899397e-15),
)  # fmt: skip


def word(seed: int, name: str, e: int) -> int:
    """Word e of the stream with this name: Philox 4x32-10."""
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    block = e // 4
    c = [block % _WORD, block // _WORD, stream % _WORD, stream // _WORD]
    key = [seed % _WORD, seed // _WORD]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            second // _WORD ^ c[1] ^ key[0],
            second % _WORD,
            first // _WORD ^ c[3] ^ key[1],
            first % _WORD,
        ]
        key = [(key[0] + 0x9E3779B9) % _WORD, (key[1] + 0xBB67AE85) % _WORD]
    return c[e % 4]


def unit(seed: int, name: str, e: int) -> float:
    """R-3."""
    high, low = word(seed, name, 2 * e) >> 6, word(seed, name, 2 * e + 1) >> 6
    return (high * 2**26 + low + 0.5) * 2.0**-52


def _log(x: float) -> float:
    f, e = math.frexp(x)
    if f < float.fromhex("0x1.6a09e667f3bcdp-1"):
        f, e = 2 * f, e - 1
    s = (f - 1) / (f + 1)
    z, tail = s * s, 1 / 23
    for odd in _TAIL_TERMS:
        tail = tail * z + 1 / odd
    high, low = float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33")
    return e * high + (e * low + (s + s * (tail * z)) * 2)


def _horner(coefficients: Sequence[float], t: float) -> float:
    v = coefficients[7]
    for i in range(6, -1, -1):
        v = v * t + coefficients[i]
    return v


def quantile(u: float) -> float:
    """AS 241, PPND16."""
    q = u - 0.5
    if abs(q) <= 0.425:
        t = 0.180625 - q * q
        return q * (_horner(_CENTRE[0], t) / _horner(_CENTRE[1], t))
    r = math.sqrt(-_log(u if q < 0 else 1 - u))
    P, Q, t = (*_SECOND, r - 1.6) if r <= 5 else (*_THIRD, r - 5)
    z = _horner(P, t) / _horner(Q, t)
    return -z if q < 0 else z


def values(seed: int, name: str, kind: str, spread: float, at: Iterable[int]) -> Array:
    """Elements `at` of a stream (R-4): "uniform" on ±spread, or "normal" of that deviation."""
    units = (unit(seed, name, e) for e in at)
    if kind == "uniform":
        return np.array([np.float32((2 * u - 1) * spread) for u in units], np.float32)
    return np.array([np.float32(quantile(u) * spread) for u in units], np.float32)
