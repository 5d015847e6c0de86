"""Laws of sizes for what is drawn by chance: dropout's mask, and how an adapter starts.

Dropout with p = 1/2 multiplies by 0 or 2, so that small integers stay exact. The mask of a wide x
cannot be read off a forward pass (that takes k² numbers); it is read off the backward pass, whose
dx is the mask where W = 0, dy = A = B = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.sizes import has
from pylora.conformance.problems import sizes
from pylora.conformance.problems.layers import DTYPES, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

HALF = 0.5
BLOCK = 64  # elements that are not all the same as 64 others: by chance with probability 2⁻⁶⁴
READABLE = 260  # inputs whose mask is read off a forward pass
UNLIKELY = 1e-18


def mask_of(t: Trial, p: Problem) -> Array:
    """What x is multiplied by, [m,k], and that it is 0 or 2."""
    (m, k), kind = p.x.shape, p.x.dtype
    if has(t, "dropout_backward"):
        one = np.ones((m, 1), kind), np.ones((m, k), kind), np.zeros((1, k), kind)
        low = np.ones((1, k), kind), np.ones((1, 1), kind)
        got = t.dropout_backward(*one, *low, 1.0, HALF, p.seed)[0]
    elif k <= READABLE:
        unit = np.eye(k).astype(kind)
        arrays = np.ones((m, k), kind), np.zeros_like(unit), unit, unit
        got = t.dropout_forward(*arrays, 1.0, HALF, p.seed)
    else:
        raise NotTested(f"without dropout_backward the mask of {k} inputs is not read off")
    t.expect("the mask", got, np.where(got == 0, 0.0, 2.0))
    return np.asarray(got).astype(np.float64)


def _dropout(t: Trial, p: Problem) -> None:
    mask = mask_of(t, p)
    _mixed_well(t, mask != 0)
    W = t.weight(p.W)
    y, dx, dA, dB = oracle.dropped(p.dy, p.x, mask, W, p.A, p.B, p.scale)
    at, double = f"of x {list(p.x.shape)}", p.x * p.x.dtype.type(2)
    off = allowed.forward(t, p, x=double, bias=None)
    got = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, HALF, p.seed)
    t.expect(f"y {at}", got, y, off)
    if has(t, "dropout_backward"):
        grads = t.dropout_backward(p.dy, p.x, p.W, p.A, p.B, p.scale, HALF, p.seed)
        limits = allowed.backward(t, p, x=double, A=p.A * p.A.dtype.type(2))
        for name, g, w, limit in zip(("dx", "dA", "dB"), grads, (dx, dA, dB), limits):
            t.expect(f"{name} {at}", g, w, limit)


def _mixed_well(t: Trial, kept: Array) -> None:
    """Beyond each limit as many are kept as before it, and not the same ones again."""
    flat, k = kept.reshape(-1), kept.shape[1]
    for limit in (0, *sizes.LIMITS):
        rest = flat[limit:]
        n, off = rest.size, np.sqrt(rest.size * np.log(2 / UNLIKELY) / 2)  # Hoeffding
        if n and abs(rest.sum() - n / 2) > off:
            said = f"of the {n} elements from {limit} on {int(rest.sum())} were kept with p = 1/2"
            t.fail(
                said,
                kept,
                f"abs(np.count_nonzero(RESULT.reshape(-1)[{limit}:]) - {n / 2}) <= {off}",
            )
        for shift in {limit, limit * k}:
            part = flat[:shift]
            if (
                shift >= BLOCK
                and flat.size >= 2 * shift
                and (part == flat[shift : 2 * shift]).all()
            ):
                said = (
                    f"elements {shift} to {2 * shift - 1} were given the mask of the first {shift}"
                )
                flat_ = "RESULT.reshape(-1)"
                t.fail(said, kept, f"({flat_}[:{shift}] != {flat_}[{shift}:{2 * shift}]).any()")


def _dropouts(dtype: str, examples: int) -> Iterator[Problem]:
    for p in sizes.layers(dtype, examples):
        resized = vars(p).get("resized")
        again = None if resized is None else (lambda n, make=resized: _seeded(make(n)))
        yield _seeded(p) if again is None else _seeded(p).replaced(resized=again)


def _seeded(p: Problem) -> Problem:
    return p.replaced(seed=1000 + p.seed)


# ---- initial values ------------------------------------------------------------------------------


def _init(t: Trial, p: Problem) -> None:
    A, B = t.init(p.d, p.k, p.r, p.seed, p.method)
    at = f"of d = {p.d}, k = {p.k}, r = {p.r}"
    t.expect(f"B {at}", B, np.zeros((p.d, p.r)))
    flat = np.asarray(A, np.float64).reshape(-1)
    n, deviation = flat.size, 1 / np.sqrt(3 * p.k) if p.method == "kaiming" else 1 / p.r
    if not np.isfinite(flat).all():
        t.fail(f"A {at} is not finite", A, "np.isfinite(RESULT).all()")
    edge = 1 / np.sqrt(p.k) * (1 + bounds.relative(4, "float32"))
    if p.method == "gaussian":
        edge = 12 * deviation  # beyond 12 deviations: a chance of 10⁻³²
    if n and np.abs(flat).max() > edge:
        said = f"|A| {at} reaches {np.abs(flat).max()}, beyond {edge}"
        t.fail(said, A, f"np.abs(RESULT).max() <= {edge}")
    _never_zero(t, p, A, at)
    # float32 has 2²³ steps at least in the half of the range: of n < 2¹⁷ draws 1 in 100 at most
    # meet another.
    if n >= BLOCK and np.unique(flat).size < 0.9 * n:
        said = f"of the {n} elements of A {at} only {np.unique(flat).size} are different"
        t.fail(said, A, f"np.unique(RESULT).size >= {0.9 * n}")
    for limit in sizes.LIMITS:
        rest = flat[limit:]
        # Half of what squares come to: for 256 of them a chance below 10⁻¹⁸ (Laurent & Massart).
        if rest.size >= 256 and not 0.5 < (rest**2).mean() / deviation**2 < 2.0:
            said = f"the mean square of A {at} from element {limit} on is {(rest**2).mean():.3g}"
            low, high = 0.5 * deviation**2, 2 * deviation**2
            holds = f"{low} < (RESULT.astype(float).reshape(-1)[{limit}:] ** 2).mean() < {high}"
            t.fail(f"{said}, expected {deviation**2:.3g}", A, holds)


def _never_zero(t: Trial, p: Problem, A: Array, at: str) -> None:
    """An element that is 0 for three seeds is no draw: one is so by a chance of 2⁻²⁴ or less."""
    zero = np.asarray(A) == 0
    for seed in (p.seed + 1, p.seed + 2):
        if zero.any():
            zero = zero & (np.asarray(t.init(p.d, p.k, p.r, seed, p.method)[0]) == 0)
    if zero.any():
        said = f"{int(zero.sum())} elements of A {at} are 0 for any seed"
        t.fail(said, A, f"RESULT[{tuple(int(i) for i in np.argwhere(zero)[0])}] != 0")


def _inits(dtype: str, examples: int) -> Iterator[Problem]:
    for name, top in {"k": 65536, "r": 65536, "d": 65536}.items():
        for i, size in enumerate(sizes.walk(examples, top)):

            def make(n: int, name: str = name, i: int = i) -> Problem:
                shape = {"d": 3, "k": 4, "r": 2, name: n}
                return Problem(**shape, seed=i, method=("kaiming", "gaussian")[i % 2])

            yield sizes.sized(make, size)
    for method in ("kaiming", "gaussian"):
        yield Problem(d=2, k=sizes.SQUARE, r=sizes.SQUARE, seed=7, method=method)


def _any_init() -> Any:
    return st.builds(
        lambda name, power, seed, method: Problem(
            **{"d": 3, "k": 4, "r": 2, name: int(2.0**power)}, seed=seed, method=method
        ),
        st.sampled_from("dkr"),
        st.floats(0.0, 13.0, width=16),
        st.integers(0, 2**31 - 1),
        st.sampled_from(("kaiming", "gaussian")),
    )


LAWS = (
    Law(
        "F13",
        "No size is a limit to dropout.",
        "with p = 1/2, at the sizes of F12: mask, y, dx, dA, dB as in P4, P5, exact; beyond each "
        "limit the share 1/2 is kept, and not the elements that were kept before it",
        "a counter wraps around, a mask of a tile is used again, the last part is not dropped",
        ("L-1", "D-2", "D-3"),
        ("dropout_forward",),
        lambda dtype: st.builds(_seeded, sizes.large_layers(dtype)),
        _dropout,
        dtypes=DTYPES,
        covering=_dropouts,
    ),
    Law(
        "F16",
        "No size is a limit to initial values.",
        "d, k, r at the sizes of F12: B = 0; A finite, in its range, of its variance beyond each "
        "limit, at least 9 of 10 elements different",
        "a part of A is left as zeros, or filled with the first part again",
        ("L-1", "I-1", "I-2", "I-3"),
        ("init",),
        _any_init,
        _init,
        (),
        covering=_inits,
    ),
)
