"""Laws at the edges: adapters of rank 0, float16's ends, and merging bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pylora.conformance.bounds import adapted, layer
from pylora.conformance.laws import oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.adapted import ALL_DTYPES, mixed_gradients
from pylora.conformance.problems.layers import (
    SEEDS,
    integer_array,
    long_sums,
    lora_problems,
    np_dtype,
    pick,
    plans,
    st,
)
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array

# ---- rank 0 --------------------------------------------------------------------------------------


def _or_refused(t: Trial, call: Callable[[], Any]) -> Any:
    """What the call gives; None where it raises, which is right too."""
    try:
        return call()
    except Broken as broken:
        if "raised" not in str(broken):
            raise
        t.calls.pop()
        return None


def _rank_0(t: Trial, p: Problem) -> None:
    A, B = p.A[:0], p.B[:, :0]
    y = _or_refused(t, lambda: t.forward(p.x, p.W, A, B, p.scale, p.bias))
    if y is not None:
        W = t.weight(p.W)
        off = layer.forward(p.x, W, [], p.bias, precision=t.precision)
        t.expect("y of an adapter of rank 0", y, oracle.forward(p.x, W, [], p.bias), off)


def _with_none(p: Problem) -> tuple[list[Any], int]:
    """The adapters, one of them without ranks, and which."""
    i = p.seed % len(p.adapters)
    A, B, s = p.adapters[i]
    return [*p.adapters[:i], (A[:0], B[:, :0], s), *p.adapters[i + 1 :]], i


def _rank_0_mixed(t: Trial, p: Problem) -> None:
    """Refused, or its rows are the base's and the others' are their own."""
    if not p.adapters:
        return
    adapters, _ = _with_none(p)
    y = _or_refused(t, lambda: t.forward_mixed(p.x, p.W, adapters, p.rows, p.bias))
    if y is None:
        return
    W = t.weight(p.W)
    for row in np.unique(p.rows):
        mine = np.flatnonzero(p.rows == row)
        lora = [adapters[int(row)]] if row >= 0 and adapters[int(row)][0].shape[0] else []
        want = oracle.forward(p.x[mine], W, lora, p.bias)
        off = layer.forward(p.x[mine], W, lora, p.bias, precision=t.precision)
        what = f"y of the rows of {int(row)}, beside an adapter of rank 0"
        t.expect(what, y, want, off, at=mine)


def _rank_0_gradients(t: Trial, p: Problem) -> None:
    if not p.adapters:
        return
    adapters, none = _with_none(p)
    got = _or_refused(t, lambda: t.backward_mixed(p.dy, p.x, p.W, adapters, p.rows))
    if got is None:
        return
    W = t.weight(p.W)
    for row in (int(row) for row in np.unique(p.rows)):
        mine = np.flatnonzero(p.rows == row)
        dy, x = p.dy[mine], p.x[mine]
        if row in (-1, none):
            off = adapted.without_adapter(dy, W, t.precision)
            want = layer.wide(dy) @ layer.wide(W)
            t.expect(f"dx of the rows of {row}", got[0], want, off, at=mine)
            continue
        A, B, s = adapters[row]
        wants = oracle.backward(dy, x, W, A, B, s)
        limits = layer.backward(dy, x, W, A, B, s, precision=t.precision)
        t.expect(f"dx of the rows of {row}", got[0], wants[0], limits[0], at=mine)
        for j, name in enumerate(("dA", "dB")):
            what = f"{name} of adapter {row}, beside one of rank 0"
            t.expect(what, got[1], wants[1 + j], limits[1 + j], item=(row, j))


@st.composite  # type: ignore[untyped-decorator]
def _ranks_that_are_none(draw: Any) -> Problem:
    p = draw(plans())
    bad = draw(pick((0, -1, -8, 1.5, "8", None)))
    config = {**p.config, "r": bad}
    config.pop("rank_pattern", None)  # it might leave nothing to the bad rank
    if draw(st.booleans()) and bad is not None:
        config = {**p.config, "rank_pattern": {p.config["target_modules"][0]: bad}}
    return Problem(**{**vars(p), "config": config, "bad": bad})


def _plan_refuses(t: Trial, p: Problem) -> None:
    why = f"a rank of {p.bad!r} in {p.config}"
    t.must_raise(why, "plan", p.config, p.modules)


# ---- float16 -------------------------------------------------------------------------------------

STEP = 2.0**-24  # float16's smallest number


@st.composite  # type: ignore[untyped-decorator]
def _below_normal(draw: Any) -> Problem:
    """Small integers, W in steps of 2⁻²⁴ and A and B in steps of 2⁻¹²: every number that is stored
    is exact in float16, and y and W' are below its normal numbers."""
    m, k, d, r = (draw(pick(n)) for n in ((1, 2, 5), (1, 2, 5, 33), (1, 2, 5, 33), (1, 2, 4)))
    rng = np.random.default_rng(draw(SEEDS))

    def make(step: float, *shape: int) -> Array:
        return (integer_array(rng, shape, 1) * step).astype(np.float16)

    return Problem(
        x=make(1.0, m, k),
        W=make(STEP, d, k),
        A=make(2.0**-12, r, k),
        B=make(2.0**-12, d, r),
        scale=draw(pick((1.0, 2.0, -1.0))),
        bias=make(STEP, d) if draw(st.booleans()) else None,
    )


def _subnormal(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    want = oracle.forward(p.x, p.W, [(p.A, p.B, p.scale)], p.bias)
    t.expect("y below float16's normal numbers", y, want)


def _subnormal_merge(t: Trial, p: Problem) -> None:
    merged = t.merge(p.W, p.A, p.B, p.scale)
    W = merged[0] if isinstance(merged, tuple) else merged
    t.expect("W' below float16's normal numbers", W, oracle.merged(p.W, p.A, p.B, p.scale))


@st.composite  # type: ignore[untyped-decorator]
def _at_the_end(draw: Any) -> Problem:
    """65504 and a little more, of either sign: 65519 is the last that rounds to 65504."""
    more = draw(pick((0, 8, 15, 16, 17, 32, 1000, 65504, -8, -16, -65504)))
    sign = draw(pick((1.0, -1.0)))
    return Problem(more=more, sign=sign)


def _rounded(value: float) -> Any:
    with np.errstate(over="ignore"):
        return np.float16(value)


def _overflow(t: Trial, p: Problem) -> None:
    one, zero = np.ones((1, 1), np.float16), np.zeros((1, 1), np.float16)
    W = np.array([[p.sign * 65504, p.sign * p.more]], np.float16)
    x = np.ones((1, 2), np.float16)
    y = t.forward(x, W, np.ones((1, 2), np.float16), zero, 1.0)
    want = np.full((1, 1), _rounded(p.sign * (65504.0 + p.more)))
    t.expect(f"y = ±(65504 + {p.more})", y, want)
    if callable(getattr(t.implementation, "merge", None)):
        lora = np.full((1, 1), p.sign * p.more, np.float16), one
        merged = t.merge(np.full((1, 1), p.sign * 65504, np.float16), *lora, 1.0)
        got = merged[0] if isinstance(merged, tuple) else merged
        t.expect(f"W' = ±(65504 + {p.more})", got, want)


@st.composite  # type: ignore[untyped-decorator]
def _back_again(draw: Any) -> Problem:
    """Terms of up to 2¹⁵ in some order that go beyond 65504 on the way and come back."""
    rng, n = np.random.default_rng(draw(SEEDS)), draw(pick((4, 8, 16)))
    terms = np.concatenate([np.full(n, 2.0**15), np.full(n - 1, -(2.0**15)), [-1024.0]])
    if draw(st.booleans()):
        terms = rng.permutation(terms)
    return Problem(terms=terms.astype(np.float16))


def _wide_sums(t: Trial, p: Problem) -> None:
    x, zero = np.ones((1, len(p.terms)), np.float16), np.zeros((1, 1), np.float16)
    y = t.forward(x, p.terms[None], x, zero, 1.0)
    t.expect("a sum that goes beyond 65504 on the way", y, np.array([[31744.0]]))


def _long(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    lora, W = [(p.A, p.B, p.scale)], t.weight(p.W)
    bound = layer.forward(p.x, W, lora, p.bias, precision=t.precision)
    t.expect("y", y, oracle.forward(p.x, W, lora, p.bias), bound)


# ---- merging, bit for bit ------------------------------------------------------------------------


def round_to(values: Array, dtype: str) -> Array:
    """float64 rounded once to the nearest of a dtype, ties to even: as float64 or as infinity."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(dtype).astype(np.float64)
    _, exponent = np.frexp(values)
    step = np.ldexp(1.0, np.maximum(exponent - 8, -133))
    rounded: Array = np.rint(values / step) * step
    top = (2.0 - 2.0**-7) * 2.0**127
    return np.where(np.abs(rounded) > top, np.copysign(np.inf, rounded), rounded)


@st.composite  # type: ignore[untyped-decorator]
def near_ties(draw: Any, dtype: str = "float32") -> Problem:
    """W of 1 to 2, and s B A half a step of it, exactly or 2⁻⁴⁸ more or less: what a rounding by
    way of a wider format gets wrong."""
    d, k = draw(pick((1, 2, 8))), draw(pick((1, 3, 16)))
    rng = np.random.default_rng(draw(SEEDS))
    bits = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    W = (1 + rng.integers(0, 2 ** (bits - 1), (d, k)) * 2.0 ** (1 - bits)) * rng.choice([-1, 1])
    half = 2.0**-bits
    A = np.stack([rng.choice([half, 3 * half], k), rng.choice([0, 2.0**-24], k)])
    B = np.stack([rng.choice([-1.0, 1.0], d), rng.choice([-1.0, 1.0], d) * 2.0**-24], axis=1)
    kind, scale = np_dtype(dtype), draw(pick((1.0, -1.0)))
    return Problem(W=W.astype(kind), A=A.astype(kind), B=B.astype(kind), scale=scale)


def _merges(dtype: str) -> Any:
    return st.one_of(near_ties(dtype), lora_problems(dtype=dtype))


def _merge_bits(t: Trial, p: Problem) -> None:
    kind = layer.kind(p.W)
    total = np.zeros(p.W.shape)
    A, B = p.A.astype(np.float64), p.B.astype(np.float64)
    for i in range(A.shape[0]):
        total = total + B[:, i : i + 1] * A[i : i + 1, :]
    result = t.merge(p.W, p.A, p.B, p.scale)
    W, state = result if isinstance(result, tuple) else (result, None)
    want = round_to(p.W.astype(np.float64) + float(np.float32(p.scale)) * total, kind)
    t.expect("W', promised bit for bit,", W, want, signs=True)
    if callable(getattr(t.implementation, "unmerge", None)):
        arguments = (W, p.A, p.B, p.scale)
        back = t.unmerge(*arguments) if state is None else t.unmerge(*arguments, state)
        t.expect("unmerge(W'), promised bit for bit,", back, p.W, signs=True)


LAWS = (
    Law(
        "H1",
        "An adapter of rank 0 is refused or is the base.",
        "A [0,k], B [d,0]: an error, or y = x Wᵀ + bias within F1's bound",
        "a sum over nothing gives what lay in memory, or a division by the rank",
        ("H-1", "F-2"),
        ("forward",),
        lambda dtype: lora_problems(dtype=dtype),
        _rank_0,
        ("x", "W"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "H2",
        "An adapter of rank 0 in a mixed batch is refused or is the base for its rows alone.",
        "an error, or y of its rows is the base's and y of all others their own",
        "offsets into packed adapters go wrong after one that has no ranks",
        ("H-1", "X-3"),
        ("forward_mixed",),
        mixed_gradients,
        _rank_0_mixed,
        ("x", "W"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "H3",
        "An adapter of rank 0 in a mixed batch does not disturb the gradients.",
        "an error, or dx = dy W for its rows, and dx, dA and dB of the others as in B20",
        "as H2",
        ("H-1", "B-9"),
        ("backward_mixed",),
        mixed_gradients,
        _rank_0_gradients,
        ("dy", "x", "W"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "H4",
        "A rank that is none is refused.",
        "r, and a rank in rank_pattern, of 0, -1, 1.5 or '8' must raise",
        "a division by zero, an adapter that does nothing, or a rank that is cut off",
        ("H-1", "K-6"),
        ("plan",),
        _ranks_that_are_none,
        _plan_refuses,
        (),
    ),
    Law(
        "H5",
        "Numbers below float16's normal numbers are numbers.",
        "y = x Wᵀ + bias + s (x Aᵀ) Bᵀ with equality, W and y in steps of 2⁻²⁴",
        "subnormal numbers are flushed to zero: small weights and updates are lost",
        ("H-2",),
        ("forward", "float16"),
        _below_normal,
        _subnormal,
        ("x", "W", "A", "B"),
    ),
    Law(
        "H6",
        "Merging keeps numbers below float16's normal numbers.",
        "W' = W + s B A with equality, in steps of 2⁻²⁴",
        "as H5",
        ("H-2", "M-1"),
        ("merge", "float16"),
        _below_normal,
        _subnormal_merge,
        ("W", "A", "B"),
    ),
    Law(
        "H7",
        "What is beyond float16 becomes infinity, and only that.",
        "y and W' of 65504 + c: 65504 up to 65519, from 65520 on infinity, of either sign",
        "results saturate at 65504, wrap around, or overflow too early",
        ("H-3", "N-5"),
        ("forward", "float16"),
        _at_the_end,
        _overflow,
        (),
    ),
    Law(
        "H8",
        "Sums over float16 may go beyond 65504 on the way.",
        "Σ = 31744 of terms of ±2¹⁵ in any order",
        "sums are accumulated in float16",
        ("N-2", "H-3"),
        ("forward", "float16"),
        _back_again,
        _wide_sums,
        (),
    ),
    Law(
        "H9",
        "Sums of thousands of float16 terms keep their bound.",
        "as F3, with gamma of float32 for sums and gamma_6 of float16 for what is stored",
        "sums are accumulated in float16, where 2048 + 1 is 2048",
        ("N-2", "N-1"),
        ("forward", "float16"),
        lambda: long_sums(dtype="float16"),
        _long,
    ),
    Law(
        "M22",
        "Where bits are promised, W' and the way back are those of the specification.",
        "W' = round(W + s Σ B[:,i] A[i,:]) in float64 in order, rounded once, in float32, bfloat16 "
        "and float16; unmerging gives W's bits",
        "a rounding by way of float32, a sum in float32, or another order of it",
        ("M-7", "M-8", "M-3"),
        ("merge", "bits"),
        _merges,
        _merge_bits,
        ("W", "A", "B"),
        dtypes=("float32", "bfloat16", "float16"),
    ),
)
