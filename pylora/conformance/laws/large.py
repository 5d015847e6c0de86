"""Laws of results near and beyond the largest number of a dtype, and of very small ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES, exact_problems, np_dtype, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array


@st.composite  # type: ignore[untyped-decorator]
def large_numbers(draw: Any, dtype: str = "float32") -> Problem:
    """One product of powers of two times 1, 1.25 or 1.75 each, whose exponent is anywhere below and
    beyond the largest: factors of at least 1, so that no order of multiplication overflows before
    the result does."""
    top = {"float64": 1023, "float32": 127, "bfloat16": 127, "float16": 15}[dtype]
    totals = (14, 15, 16, 17, 31, 32, 63, 64, top - 1, top, top + 1, top + 9, 2 * top)
    total = draw(st.sampled_from([n for n in totals if n <= 2 * top]))
    through = draw(st.sampled_from(("base", "adapter")))
    parts = 1 if through == "base" else 2
    left, exponents = total, []
    for n in range(parts + 1):
        most, least = min(left, top), max(0, left - top * (parts - n))
        exponents.append(left if n == parts else draw(st.integers(least, most)))
        left -= exponents[-1]
    sign, mantissa = draw(st.sampled_from((1.0, -1.0))), draw(st.sampled_from((1.0, 1.25, 1.75)))
    at = draw(st.tuples(*[st.integers(0, 2)] * 3))
    return Problem(
        dtype=dtype,
        through=through,
        exponents=tuple(exponents),
        sign=sign,
        mantissa=mantissa,
        at=at,
    )


def _large(t: Trial, p: Problem) -> None:
    """x and W, or x, A and B, of one element each that is not zero; with an adapter one row and one
    column, since an infinite h would make NaN of the zeros in other columns of B."""
    if not t.exact:
        raise NotTested("integers with one scale for a group are not exact")
    kind, (i, j, r), base = np_dtype(p.dtype), p.at, p.through == "base"
    m = d = 3 if base else 1
    i, o = i % m, r % d
    shapes = {"x": (m, 3), "W": (d, 3), "A": (3, 3), "B": (d, 3)}
    x, W, A, B = (np.zeros(s, kind) for s in shapes.values())
    first, *rest = (np.ldexp(1.0, e) for e in p.exponents)
    x[i, j] = p.sign * p.mantissa * first
    if base:
        W[o, j] = rest[0]
    else:
        A[r, j], B[o, r] = rest
    want = np.zeros((m, d), kind)
    want[i, o] = _rounded(p.sign * p.mantissa, p.exponents, kind)
    y = t.forward(x, W, A, B, 1.0)
    t.expect("y of one product", y, want)


def _rounded(mantissa: float, exponents: tuple[int, ...], kind: Any) -> Any:
    """The product in a dtype; infinite beyond its largest number."""
    with np.errstate(all="ignore"):
        value = np.longdouble(mantissa) * np.longdouble(2.0) ** sum(exponents)
        return value.astype(np.float64).astype(kind)


def _large_merge(t: Trial, p: Problem) -> None:
    """W' = B A of one product: infinite just where it is beyond the largest number."""
    kind, (i, j, r) = np_dtype(p.dtype), p.at
    W, A, B = (np.zeros((3, 3), kind) for _ in range(3))
    exponents = p.exponents[:2]
    B[i, r], A[r, j] = (
        p.sign * p.mantissa * np.ldexp(1.0, exponents[0]),
        np.ldexp(1.0, exponents[1]),
    )
    result = t.merge(W, A, B, 1.0)
    merged = result[0] if isinstance(result, tuple) else result
    want = np.zeros((3, 3), kind)
    want[i, j] = _rounded(p.sign * p.mantissa, exponents, kind)
    t.expect("W' of one product", merged, want)


# float16 has no room below 1: its normal numbers end at 2⁻¹⁴.
TINY = {"float64": -900, "float32": -100, "bfloat16": -100}


def _scaled(a: Array, power: int) -> Array:
    return (a.astype(np.float64) * 2.0**power).astype(a.dtype)


def _power(t: Trial, p: Problem) -> int:
    if not t.exact:
        raise NotTested("integers with one scale for a group are not exact")
    return TINY[str(p.x.dtype)]


def _tiny_merge(t: Trial, p: Problem) -> None:
    """W and s B A both by the same power of two: W' too."""
    power = _power(t, p)
    W, A, B = _scaled(p.W, power), _scaled(p.A, power // 2), _scaled(p.B, power - power // 2)
    result = t.merge(W, A, B, p.scale)
    merged = result[0] if isinstance(result, tuple) else result
    want = oracle.merged(p.W, p.A, p.B, p.scale) * 2.0**power
    off = allowed.merged(p.W, p.A, p.B, p.scale) * 2.0**power
    t.expect(f"W' of numbers about 2**{power}", merged, want, off)


def _tiny_gradients(t: Trial, p: Problem) -> None:
    """dy by a power of two: every gradient too."""
    power = _power(t, p)
    got = t.backward(_scaled(p.dy, power), p.x, p.W, p.A, p.B, p.scale)
    wants = oracle.backward(p.dy, p.x, t.weight(p.W), p.A, p.B, p.scale)
    for name, g, want, off in zip(("dx", "dA", "dB"), got, wants, allowed.backward(t, p)):
        t.expect(f"{name} of dy about 2**{power}", g, want * 2.0**power, off * 2.0**power)


LAWS = (
    Law(
        "V21",
        "A merge of tiny numbers is exact.",
        "W'(2ⁿ W, 2ⁿ s B A) = 2ⁿ W'(W, s B A), n = -100, in float64 -900",
        "an update below some size is skipped, or passes through a dtype that it is lost in",
        ("M-1", "N-6", "V-4"),
        ("merge",),
        exact_problems,
        _tiny_merge,
        ("W", "A", "B"),
        dtypes=tuple(TINY),
    ),
    Law(
        "V22",
        "Gradients of a tiny dy are exact.",
        "dx, dA and dB of 2ⁿ dy are 2ⁿ times those of dy, n = -100, in float64 -900",
        "a gradient below some size is taken for none, or passes through float16",
        ("B-1", "N-6"),
        ("backward",),
        exact_problems,
        _tiny_gradients,
        ("dy", "x", "A", "B"),
        dtypes=tuple(TINY),
    ),
    Law(
        "V9",
        "Large numbers are exact up to the largest, and infinite beyond.",
        "y of one product of factors of at least 1: exact, and ±inf where it is beyond the largest "
        "number of the dtype, not before",
        "results saturate, are clipped at 65504, or an intermediate in a narrower dtype overflows",
        ("V-5", "N-5"),
        ("forward",),
        large_numbers,
        _large,
        (),
        dtypes=DTYPES,
    ),
    Law(
        "V10",
        "A merged weight is exact up to the largest number, and infinite beyond.",
        "as V9, of W' = B A",
        "the merge saturates: a model that broke looks sound",
        ("V-5", "M-1"),
        ("merge",),
        large_numbers,
        _large_merge,
        (),
        dtypes=DTYPES,
    ),
)
