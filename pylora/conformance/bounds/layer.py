"""How far a correct implementation may be from the exact result: the bounds of the laws.

They hold for every order of summation, fused or not, for either order of the products
((x Aᵀ) Bᵀ, x (B A)ᵀ, or x (W + s B A)ᵀ), wherever the scale is multiplied in. By Higham, "Accuracy
and Stability of Numerical Algorithms", 2nd ed., 2002: each term of the result is reached by n
roundings, so it is off by at most gamma_n = n u / (1 - n u) of itself (lemmas 3.1 and 3.3), and the
sum by gamma_n times the sum of the terms' magnitudes (3.5). n is counted at each function. Products
below the normal numbers, and inputs there that are taken as zero, add the terms in `_floor`.

bfloat16: sums are accumulated in float32 or wider (the n above) and each intermediate result may be
stored in bfloat16 (a second, small count). "Exact" is the oracle in float64, or for float64 in
`numpy.longdouble`, whose own gamma_n is added. No number here is tuned.

float16 as bfloat16, and it ends at 65504: where the magnitudes that are summed reach that, or those
of a product that may be stored on the way, the bound is infinite (spec H-3 says what holds there).
Its subnormal numbers are numbers (H-2): what is stored below 2⁻¹⁴ is off by half of 2⁻²⁴.

`precision`: what an implementation whose weights are stored in fewer bits rounds of the products'
other factors (moves.py); W is the stored weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import moves
from pylora.conformance.bounds.ops import gamma, tiny, unit
from pylora.types import Array

STORED = {"forward": 5, "gradient": 6}  # intermediate results that may be stored in 16 bits
NARROW = {"bfloat16": "bf16", "float16": "f16"}  # dtypes whose sums are accumulated in float32
LARGEST = 65504.0  # of float16


def kind(a: Array) -> str:
    """The dtype as the kit names it."""
    return str(np.asarray(a).dtype)


def wide(a: Array) -> Array:
    """`a` in the oracle's precision: longdouble for float64, else float64 (complex stays)."""
    if a.dtype == np.complex128:
        return a
    return a.astype(np.longdouble if a.dtype == np.float64 else np.float64)


def relative(n: int, dtype: str, stored: int = 0) -> float:
    """gamma_n of the accumulating dtype, of `stored` roundings to 16 bits, and of the oracle.
    Infinite where so many are stored (a sum of hundreds of adapters) that nothing is promised."""
    if dtype in NARROW:
        if stored * unit(NARROW[dtype]) >= 1:
            return float("inf")
        a, b = gamma(n, "f32"), gamma(stored, NARROW[dtype])
        return a + b + a * b + gamma(n, np.float64)
    if dtype == "float32":
        return gamma(n, np.float32) + gamma(n, np.float64)
    return gamma(n, np.float64) + gamma(n, np.longdouble)


def smallest(dtype: str) -> float:
    """The smallest normal number; bfloat16 has float32's, of float16 it is the smallest of all."""
    if dtype == "float16":
        return 2.0**-24
    return tiny(np.float64 if dtype in ("float64", "complex128") else np.float32)


def _floor(X: Array, Y: Array, dtype: str) -> Array:
    """Of X [m,n] Y [n,p]: what underflow adds. A product may lose the smallest normal number t, a
    partial sum too; an input below t that is taken as zero loses t times the other factor."""
    n = X.shape[1]
    return smallest(dtype) * (X.sum(axis=1)[:, None] + Y.sum(axis=0)[None, :] + 2 * n)


def _abs(a: Array) -> Array:
    return np.abs(wide(np.asarray(a)))


def chain(X: Array, Y: Array, Z: Array, s: float, dtype: str) -> tuple[Array, Array]:
    """Magnitude s |X| |Y| |Z| of a product of three, and what underflow may add to it.

    Any of the three orders of multiplication, s multiplied into any factor or at the end."""
    s, t = abs(float(s)), smallest(dtype)
    XY, YZ = X @ Y, Y @ Z
    left = s * (_floor(X, Y, dtype) @ Z + _floor(XY, Z, dtype))
    right = s * (X @ _floor(Y, Z, dtype) + _floor(X, YZ, dtype))
    scaled = t * (1 + s) * (X.sum(axis=1)[:, None] + 1) * (Z.sum(axis=0)[None, :] + 1)
    inner = t * (1 + s) * (YZ.sum(axis=0)[None, :] + XY.sum(axis=1)[:, None])
    low = left + right + scaled + inner + t * (1 + s)
    if dtype == "float16":  # what may be stored on the way, with the scale or without it
        rows, columns = (
            _beyond(max(1.0, s) * np.hstack([X, XY]), 1),
            _beyond(max(1.0, s) * np.vstack([Z, YZ]), 0),
        )
        low = low + rows + columns
    return s * (XY @ Z), low


def _beyond(a: Array, axis: int) -> Array:
    """Infinity for each row or column that has an element beyond float16's largest, else 0."""
    top = a.max(axis=axis, keepdims=True, initial=0.0)
    return np.where(top >= LARGEST, np.inf, 0.0)


def ends(bound: Array, size: Array, dtype: str) -> Array:
    """The bound, infinite where the magnitudes `size` reach what the dtype ends at."""
    return np.where(size >= LARGEST, np.inf, bound) if dtype == "float16" else bound


def forward(
    x: Array,
    W: Array,
    adapters: list[tuple[Array, Array, float]],
    bias: Array | None = None,
    extra: int = 0,
    precision: str = "fp32",
    stored: int = 0,
) -> Array:
    """Of y = x Wᵀ + bias + sum of s (x Aᵀ) Bᵀ, [m,d].

    n = k + R + 4: a term of the adapters' is multiplied and summed over k, multiplied and summed
    over all ranks R = sum r (in one accumulator with the base's k terms, at worst), by the scale,
    itself rounded, and added to base and bias. `extra`: further roundings, such as dropout's, and
    `stored` those to 16 bits.
    """
    dtype, X, Wt = kind(x), _abs(x), _abs(W).T
    n = x.shape[1] + sum(A.shape[0] for A, _, _ in adapters) + 4 + len(adapters) + extra
    n += moves.roundings(precision)
    Ex, Em = _moved(X, dtype, precision)
    off, total = Ex @ Wt, (X + Ex) @ moves.size(Wt.T, precision).T
    floor = _floor(X + Ex, Wt, dtype)
    if bias is not None:
        total = total + _abs(bias)
    for A, B, s in adapters:
        Aa, Bt = _abs(A), _abs(B).T
        Ea = _moved(Aa, dtype, precision)[1]
        term, low = chain(X + Em, (Aa + Ea).T, Bt, s, dtype)
        off = off + abs(float(s)) * ((Em @ (Aa + Ea).T + X @ Ea.T) @ Bt)
        total, floor = total + term, floor + low
    bound = relative(n, dtype, STORED["forward"] + len(adapters) + stored) * total + floor + off
    return ends(bound, total, dtype)


def _moved(a: Array, dtype: str, precision: str) -> tuple[Array, Array]:
    """By how much a precision moves a, in the product with W and in those with an adapter. An array
    that is bfloat16 is bfloat16 already."""
    if dtype == "bfloat16" and precision == "bf16":
        return np.zeros_like(a), np.zeros_like(a)
    return moves.of_x(a, precision), moves.of_low(a, precision)


def backward(
    dy: Array,
    x: Array,
    W: Array,
    A: Array,
    B: Array,
    scale: float,
    extra: int = 0,
    precision: str = "fp32",
    more: int = 0,
) -> tuple[Array, Array, Array]:
    """Of dx, dA, dB: products of three, n the lengths of their two sums, and 4 for scale and sums.

    dx = dy W + s (dy B) A: d + r; dA = s (dy B)ᵀ x: d + m; dB = s dyᵀ (x Aᵀ): m + k. `extra` are
    further roundings, and `more` those to 16 bits.
    """
    dtype, (m, d), (r, k) = kind(x), dy.shape, A.shape
    D, X, Aa, Ba = _abs(dy), _abs(x), _abs(A), _abs(B)
    s, stored = abs(float(scale)), STORED["gradient"] + more
    Dw = D + (moves.of_dy(D, precision) if dtype != "bfloat16" else 0.0)
    # Of the adapter's factors: dy, x, B in g and A in h, each as it may be moved.
    Dm, Xm, Bm, Am = (a + _moved(a, dtype, precision)[1] for a in (D, X, Ba, Aa))
    through, low = chain(Dm, Bm, Aa, scale, dtype)
    size = Dw @ _abs(W) + through
    dx = relative(d + r + 4 + extra, dtype, stored) * size
    dx = ends(dx + low + _floor(Dw, _abs(W), dtype), size, dtype)
    mag_A, low_A = chain(Bm.T, Dm.T, Xm, scale, dtype)
    mag_B, low_B = chain(Dm.T, Xm, Am.T, scale, dtype)
    dA = ends(relative(d + m + 4 + extra, dtype, stored) * mag_A + low_A, mag_A, dtype)
    dB = ends(relative(m + k + 4 + extra, dtype, stored) * mag_B + low_B, mag_B, dtype)
    if precision == "fp32":
        return dx, dA, dB
    dx = dx + (Dw - D) @ _abs(W) + (through - s * (D @ Ba @ Aa))
    return dx, dA + (mag_A - s * (Ba.T @ D.T @ X)), dB + (mag_B - s * (D.T @ (X @ Aa.T)))


def merged(W: Array, A: Array, B: Array, scale: float) -> Array:
    """Of W' = W + s B A: n = r + 4 roundings, in which W may take part (one accumulator); to
    16 bits the sum is rounded once and the update not before (spec M-1)."""
    dtype, r, s = kind(W), A.shape[0], abs(float(scale))
    summed = "float32" if dtype in NARROW else dtype
    delta = s * (_abs(B) @ _abs(A))
    low = s * _floor(_abs(B), _abs(A), summed) + 2 * smallest(summed) * (
        2 + s + _abs(B).sum(axis=1)[:, None] + _abs(A).sum(axis=0)[None, :]
    )
    off = relative(r + 4, summed) * (_abs(W) + delta) + low
    if dtype in NARROW:
        exact = np.abs(wide(W) + float(scale) * (wide(B) @ wide(A)))
        off = off + unit(NARROW[dtype]) * (exact + off)
        off = ends(off + (2.0**-25 if dtype == "float16" else 0.0), exact + off, dtype)
    return np.asarray(off)


def unmerged(W: Array, A: Array, B: Array, scale: float) -> Array:
    """Of W after merge and unmerge: merge's error, and that of a sum with W' in place of W."""
    once, s = merged(W, A, B, scale), abs(float(scale))
    size = _abs(W) + s * (_abs(B) @ _abs(A)) + once
    dtype = kind(W)
    again = relative(A.shape[0] + 4, "float32" if dtype in NARROW else dtype)
    if dtype not in NARROW:
        return 2 * once + again * 2 * size
    # s B A is at most the size of W + s B A, W' too.
    stored = unit(NARROW[dtype]) * (_abs(W) + 2 * once)
    stored = stored + (2.0**-25 if dtype == "float16" else 0.0)
    return ends(2 * once + again * 2 * size + stored, size, dtype)


def merged_forward(
    x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
) -> Array:
    """Of x W'ᵀ + bias against the exact adapter's output: the error of W' through |x|, and that of
    the product with W'."""
    off = merged(W, A, B, scale)
    size = _abs(W) + abs(float(scale)) * (_abs(B) @ _abs(A)) + off
    none = [(np.zeros_like(A[:0]), np.zeros_like(B[:, :0]), 0.0)]
    bound: Array = _abs(x) @ off.T + forward(x, size.astype(x.dtype), none, bias) * (1 + 2.0**-7)
    return bound


def loss_gradients(
    batches: list[tuple[Array, Array, Array]],
    W: Array,
    A: Array,
    B: Array,
    scale: float,
    precision: str = "fp32",
) -> tuple[Array, Array]:
    """Of dA, dB: dy = (y - target) / N is off by the forward's bound and 4 roundings (the
    difference, the weight, its product), which the gradients pass on; sums are over all rows."""
    x = np.concatenate([b[0] for b in batches])
    target = np.concatenate([b[1] for b in batches])
    counted = np.concatenate([b[2] for b in batches]).astype(bool)
    x, target = x[counted], target[counted]
    n = max(1, len(x))
    y = _abs(x) @ _abs(W).T + abs(float(scale)) * (_abs(x) @ _abs(A).T @ _abs(B).T)
    size = (y + _abs(target)) / n
    off = forward(x, W, [(A, B, scale)], precision=precision) / n
    off = off + relative(4, kind(x), 4) * size
    dy, extra = (size + off).astype(x.dtype), len(batches) + 4
    _, dA, dB = backward(dy, x, W, A, B, scale, extra, precision)
    s = abs(float(scale))
    through = s * (off @ _abs(B)).T @ _abs(x), s * off.T @ (_abs(x) @ _abs(A).T)
    return 1.01 * (dA + through[0]), 1.01 * (dB + through[1])  # products of two small terms


def finite(*arrays: Any) -> bool:
    """Whether all are free of NaN and infinity."""
    return all(bool(np.isfinite(np.asarray(a, np.float64)).all()) for a in arrays)
