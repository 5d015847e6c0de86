"""Laws of special numbers: NaN and infinity, results beyond the largest number, and a B that is
almost zero.

One element of one input is made NaN or infinite. Where the formula reads it, the result must show
it, whatever the scale; everywhere else the result must be as it is without.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds.moves import INTEGERS
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES, exact_problems, pick, st
from pylora.conformance.testcase import Broken, NotTested, Problem, Trial
from pylora.types import Array

ODD = (float("nan"), float("inf"), float("-inf"))
ALL = slice(None)
NAMES = ("dx", "dA", "dB")


def poisoned(*names: str) -> Any:
    """Exact problems, one of whose arrays gets an odd number at a drawn place; as a function of
    the dtype. A is all zeros at times, x or dy too, and s often 0."""

    def made(p: Problem, name: str, odd: float, at: tuple[int, int], scale: Any) -> Problem:
        A = p.A * p.A.dtype.type(at[1] % 5 > 0)
        more = {} if scale is None else {"scale": scale}
        for factor, rest in (("x", 2), ("dy", 5)):  # of another length than A's and `ready`'s
            if name != factor and at[1] % 7 == rest:
                more[factor] = np.zeros_like(getattr(p, factor))
        return p.replaced(name=name, odd=odd, at=at, A=A, **more)

    def problems(dtype: str = "float32") -> Any:
        exact = exact_problems(dtype, tokens=(1, 2, 3, 5), features=(1, 2, 3, 16, 33))
        places = st.tuples(st.integers(0, 99), st.integers(0, 99))
        return st.builds(made, exact, pick(names), pick(ODD), places, pick((None, None, 0.0)))

    return problems


def ready(p: Problem) -> Problem:
    """With a bias, and with a B that is not zero, so that nothing may be left out; where B itself
    is to have the odd number, it is zero but for that at times, and where a row of A is to have it
    the column of B that this row is multiplied by."""
    B, r, rank = p.B.copy(), p.B.shape[1], p.at[1]
    if p.name == "A" and p.at[1] % 3 == 0 and r > 1:
        B[:, _row(p, r)] = 0
        rank = _row(p, r) + 1
    if p.name == "B" and p.at[0] % 4 == 0:
        B[...] = 0
    elif not B.any():
        B[p.at[0] % B.shape[0], rank % r] = 1
    bias = p.bias if p.bias is not None else np.zeros(p.W.shape[0], p.x.dtype)
    return p.replaced(B=B, bias=bias)


def _row(p: Problem, rows: int) -> int:
    """The row of the array that gets the odd number."""
    return int(p.at[0] // 4 % rows)


def poison(t: Trial, p: Problem) -> tuple[Problem, int, int]:
    """The problem with the odd number in it, and where: row and column (of a bias, its element)."""
    if p.name == "W" and t.precision in INTEGERS:
        raise NotTested("a group of such a weight has one scale, which the odd number takes")
    a = getattr(p, p.name).copy()
    i, j = _row(p, a.shape[0]), p.at[1] % a.shape[-1]
    a[(i, j) if a.ndim == 2 else j] = p.odd
    return p.replaced(**{p.name: a}), i, j


def reaches(
    t: Trial,
    what: str,
    got: Any,
    where: Any,
    odd: float,
    want: Array,
    bound: Any,
    of: Any,
    left_out: Any = False,
) -> None:
    """`got` shows the odd number at `where` (None: nowhere), and is `want` elsewhere. `of`: the
    result that it is a part of, and the key. `left_out`: where the other factor is zero in a whole
    row, so that the term may be left out (V-2); it may be shown or not."""
    result, key = of
    inside = np.zeros(want.shape, bool)
    if where is not None:
        inside[where] = True
    must = inside & ~np.broadcast_to(left_out, want.shape)
    part = np.asarray(got, np.float64)[must]
    if not (np.isnan(part) if np.isnan(odd) else ~np.isfinite(part)).all():
        name = "RESULT" + (f"[{key}]" if key is not None else "")
        test = "np.isnan" if np.isnan(odd) else "~np.isfinite"
        holds = f"{test}({name}[np.array({must.tolist()})].astype(np.float64)).all()"
        t.fail(f"{what} does not show the {odd} that it is computed from", result, holds)
    outside = np.flatnonzero(~inside.reshape(-1))
    off = np.broadcast_to(np.asarray(bound, np.float64), want.shape).reshape(-1)[outside]
    said = f"{what} where the {odd} is not read"
    t.expect(said, got.reshape(-1), want.reshape(-1)[outside], off, at=outside)


def _forward(t: Trial, p: Problem) -> None:
    clean = ready(p)
    q, i, j = poison(t, clean)
    y = t.forward(q.x, q.W, q.A, q.B, q.scale, q.bias)
    where = {"x": (i, ALL), "W": (ALL, i), "B": (ALL, i), "A": (ALL, ALL), "bias": (ALL, j)}
    want = oracle.forward(clean.x, t.weight(clean.W), [(clean.A, clean.B, q.scale)], clean.bias)
    said = f"y, with {p.odd} in {p.name}[{i}, {j}] and s = {q.scale},"
    idle = {"A": _no_row(clean.B).T, "B": _no_row(clean.x.astype(float) @ clean.A.astype(float).T)}
    off, out = allowed.forward(t, clean), idle.get(p.name, False)
    reaches(t, said, y, where[p.name], p.odd, want, off, (y, None), out)


def _no_row(a: Array) -> Array:
    """[rows, 1]: whether a row of `a` is all zeros."""
    none: Array = ~(np.asarray(a) != 0).any(axis=1, keepdims=True)
    return none


def _base(t: Trial, p: Problem) -> None:
    clean = ready(p)
    q, i, j = poison(t, clean)
    y = t.base(q.x, q.W, q.bias)
    where = {"x": (i, ALL), "W": (ALL, i), "bias": (ALL, j)}
    want = oracle.forward(clean.x, t.weight(clean.W), [], clean.bias)
    said = f"the base's y, with {p.odd} in {p.name}[{i}, {j}],"
    reaches(t, said, y, where[p.name], p.odd, want, allowed.base(t, clean), (y, None))


def _backward(t: Trial, p: Problem) -> None:
    clean = ready(p)
    q, i, j = poison(t, clean)
    got = t.backward(q.dy, q.x, q.W, q.A, q.B, q.scale)
    # Rows and columns of dx [m,k], dA [r,k], dB [d,r] that read element (i, j) of each.
    where: dict[str, tuple[Any, Any, Any]] = {
        "dy": ((i, ALL), (ALL, ALL), (j, ALL)),
        "x": (None, (ALL, j), (ALL, ALL)),
        "W": ((ALL, j), None, None),
        "A": ((ALL, j), None, (ALL, i)),
        "B": ((ALL, ALL), (j, ALL), None),
    }
    want = oracle.backward(clean.dy, clean.x, t.weight(clean.W), clean.A, clean.B, q.scale)
    limits = allowed.backward(t, clean)
    idle = {"A": _no_row(clean.dy.astype(float) @ clean.B.astype(float)), "B": _no_row(clean.A.T).T}
    for n, name in enumerate(NAMES):
        said = f"{name}, with {p.odd} in {p.name}[{i}, {j}] and s = {q.scale},"
        of, out = (got, n), idle.get(p.name, False) if n == 0 else False
        reaches(t, said, got[n], where[p.name][n], p.odd, want[n], limits[n], of, out)


def _merge(t: Trial, p: Problem) -> None:
    clean = ready(p)
    q, i, j = poison(t, clean)
    result = t.merge(q.W, q.A, q.B, q.scale)
    pair = isinstance(result, tuple)
    merged, state = result if pair else (result, None)
    where = {"W": (i, j), "A": (ALL, j), "B": (i, ALL)}
    want = oracle.merged(clean.W, clean.A, clean.B, q.scale)
    bound = allowed.merged(clean.W, clean.A, clean.B, q.scale)
    said = f"W', with {p.odd} in {p.name}[{i}, {j}] and s = {q.scale},"
    of = (result, 0) if pair else (merged, None)
    reaches(t, said, merged, where[p.name], p.odd, want, bound, of)
    if (
        t.implementation.exact_unmerge is True
        if hasattr(t.implementation, "exact_unmerge")
        else False
    ):
        back = t.unmerge(merged, q.A, q.B, q.scale, *(() if state is None else (state,)))
        t.expect(
            "W, merged and unmerged, with an odd number in the adapter,", back, q.W, signs=True
        )


def _odd_scale(t: Trial, p: Problem) -> None:
    """Of one rank whose A and B have no zeros: only rows of x that A takes to zero are left out."""
    A, B = (np.where(a == 0, 1, a).astype(a.dtype) for a in (p.A[:1], p.B[:, :1]))
    rows = np.flatnonzero(~_no_row(p.x.astype(float) @ A.astype(float).T))
    try:
        y = t.forward(p.x, p.W, A, B, p.odd, p.bias)
    except Broken:
        t.calls[-1].refused = True  # which is right too
        return
    if np.isfinite(np.asarray(y, np.float64)[rows]).any():
        holds = f"not np.isfinite(RESULT[{rows.tolist()}].astype(np.float64)).any()"
        t.fail(f"y with s = {p.odd} is finite", y, holds)


def _hardly_zero(t: Trial, p: Problem) -> None:
    """B has one or two elements that are not zero, at any place."""
    B = np.zeros_like(p.B)
    d, r = B.shape
    i, j = p.at[0] % d, p.at[1] % r
    if p.at[0] % 3 == 0:
        i, j = d - 1, r - 1
    B[i, j] = 1
    if p.at[1] % 2 and B.size > 1:  # a sum of zero
        B[(i + 1) % d, (j + (d == 1)) % r] = -1
    A = np.where(p.A == 0, 1, p.A).astype(p.A.dtype)
    q = p.replaced(A=A, B=B, scale=2.0)
    y = t.forward(q.x, q.W, A, B, q.scale, q.bias)
    want = oracle.forward(q.x, t.weight(q.W), [(A, B, q.scale)], q.bias)
    t.expect(
        f"y with B zero but for {int((B != 0).sum())} elements", y, want, allowed.forward(t, q)
    )
    B = np.zeros_like(B)
    B[i, j] = p.odd
    y = t.forward(q.x, q.W, A, B, q.scale, q.bias)
    want = oracle.forward(q.x, t.weight(q.W), [], q.bias)
    off, idle = allowed.base(t, q), _no_row(q.x.astype(float) @ A.astype(float).T)
    said = f"y with B zero but for {p.odd} at [{i}, {j}]"
    reaches(t, said, y, (ALL, i), p.odd, want, off, (y, None), idle)


def _tiny_B(t: Trial, p: Problem) -> None:
    """B is far below 1, and x above as much: what is tiny is not zero."""
    down = {"float64": -500, "float32": -60, "bfloat16": -60, "float16": -10}[str(p.x.dtype)]
    tiny, huge = np.ldexp(1.0, down), np.ldexp(1.0, -down)
    B = (p.B.astype(np.float64) * tiny).astype(p.B.dtype)
    A = (p.A.astype(np.float64) * huge).astype(p.A.dtype)
    q = p.replaced(scale=1.0)
    y = t.forward(p.x, p.W, A, B, 1.0, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, 1.0)], p.bias)
    t.expect(f"y with B scaled by 2**{down} and A by its inverse", y, want, allowed.forward(t, q))


def _signed_zeros(t: Trial, p: Problem) -> None:
    """B is all -0.0, or of both zeros, and A has an odd number: the base's bits."""
    B, A = np.zeros_like(p.B), p.A.copy()
    B[...] = -B if p.at[0] % 2 else B
    B.reshape(-1)[p.at[1] % B.size] = -0.0
    A[p.at[0] % A.shape[0], p.at[1] % A.shape[1]] = p.odd
    x = np.where(p.x == 0, -0.0, p.x).astype(p.x.dtype)
    W = np.abs(p.W)
    want = t.base(x, W)
    y = t.forward(x, W, A, B, p.scale)
    t.expect(f"y with B = -0.0 and {p.odd} in A, against the base", y, want, signs=True)


LAWS = (
    Law(
        "V1",
        "NaN and infinity in an input show in y where they are read, whatever s, and only there.",
        "one element of x, W, A, B or bias is NaN or ±inf (B ≠ 0): y is NaN, or not finite, in the "
        "row (x), the column (W, B, bias) or everywhere (A), but for what V-2 lets leave out; "
        "elsewhere exact",
        "a short cut for s = 0 or a zero in B hides NaN, or it is cleaned away; or it spreads",
        ("V-1", "V-2", "N-5", "F-7"),
        ("forward",),
        poisoned("x", "W", "A", "A", "B", "B", "bias"),
        _forward,
        ("x", "W", "A", "B", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "V2",
        "NaN and infinity show in the base's y where they are read, and only there.",
        "as V1, without an adapter",
        "as V1",
        ("V-1", "N-5", "F-7"),
        ("base",),
        poisoned("x", "W", "bias"),
        _base,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "V3",
        "NaN and infinity show in the gradients where they are read, and only there.",
        "one element of dy, x, W, A or B (B ≠ 0) is NaN or ±inf: in dx, dA and dB the rows and "
        "columns that the formulas of B-1 compute from it, elsewhere exact",
        "a gradient is cleaned or clipped, so that a training goes on that broke; or one bad token "
        "reaches others",
        ("V-1", "V-2", "N-5", "B-7"),
        ("backward",),
        poisoned("dy", "x", "W", "A", "B"),
        _backward,
        ("x", "W", "A", "B", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "V4",
        "NaN and infinity show in a merged weight where they are read; unmerging takes them out.",
        "W'[i,j] for one in W, W'[:,j] for A[i,j], W'[i,:] for B[i,j], elsewhere exact; where "
        "exact unmerging is promised, W comes back bit for bit",
        "a merged file looks sound where the adapter is not; or the weight is lost with it",
        ("V-1", "V-2", "M-3", "N-5"),
        ("merge", "unmerge"),
        poisoned("W", "A", "B"),
        _merge,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "V5",
        "A scale that is no finite number is refused, or shows.",
        "s = NaN or ±inf and B ≠ 0: forward raises, or no element of y is finite",
        "the scale is replaced by another, and the adapter answers as if it were sound",
        ("V-3", "S-4"),
        ("forward",),
        poisoned("x"),
        _odd_scale,
        ("x", "W", "A", "B", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "V6",
        "B is zero only where all of it is.",
        "y of a B with one element that is not zero, or two whose sum is 0, at any place: exact; "
        "one that is NaN or ±inf shows",
        "whether B is zero is asked of a part of it, of its sum, or of the first adapter",
        ("V-4", "F-1"),
        ("forward",),
        poisoned("x"),
        _hardly_zero,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "V7",
        "What is tiny is not zero.",
        "y(2ⁿ A, 2⁻ⁿ B) = y(A, B), n = 60, in float64 500: exact",
        "B is compared with a tolerance, or passes through float16",
        ("V-4", "N-6"),
        ("forward",),
        poisoned("x"),
        _tiny_B,
        ("x", "W", "A", "B", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "V8",
        "A B of negative zeros is zero.",
        "B = ±0 implies that y has the bits of base(x), NaN or ±inf in A or not",
        "bits are compared where numbers should be: -0.0 is added up and changes signs of zeros",
        ("V-4", "V-6", "F-2"),
        ("forward", "base", "bitwise"),
        poisoned("x"),
        _signed_zeros,
        ("x", "W", "A"),
        dtypes=DTYPES,
    ),
)
