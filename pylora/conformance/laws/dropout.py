"""Laws of dropout on the input of A, and of how adapters start.

The mask is read off the implementation: with W = 0, A = B = I and s = 1 the output for x = 1 is the
mask itself. It must be a function of the seed and of x's shape; the other laws use it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.bounds import moves
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    KINDS,
    SEEDS,
    elements,
    exact_problems,
    pick,
    st,
)
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

# The chance that a law about chance fails a correct implementation, once.
UNLIKELY = 1e-18
STORED = 2  # what dropout adds to the roundings to 16 bits: the factor, and what it multiplies


@st.composite  # type: ignore[untyped-decorator]
def dropout_problems(  # type: ignore[no-untyped-def]
    draw, dtype: str = "float32", large: bool = False
) -> Problem:
    """As lora_problems, with p and a seed: of one kind all, or one array beside ordinary others, so
    that what is done to subnormal numbers, zeros or large ones in it shows."""
    m, k = (
        (draw(pick((64, 40))), draw(pick((32, 50))))
        if large
        else (draw(pick((1, 2, 3, 8, 0))), draw(pick((1, 2, 3, 8, 17))))
    )
    d, r = draw(pick((1, 2, 3, 8, 17))), draw(pick((1, 2, 4)))
    rng = np.random.default_rng(draw(SEEDS))
    common, odd = draw(pick(KINDS)), draw(pick(("x", "W", "A", "B", "dy", None, None)))
    shapes = {"x": (m, k), "W": (d, k), "A": (r, k), "B": (d, r), "dy": (m, d)}
    kinds = {n: common if odd in (None, n) else "normal" for n in shapes}
    return Problem(
        **{name: elements(rng, shape, kinds[name], dtype) for name, shape in shapes.items()},
        scale=draw(pick((1.0, 2.0, -0.5))),
        p=draw(pick((0.5, 0.1, 0.25, 0.9))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def _mask(t: Trial, shape: tuple[int, int], p: float, seed: int, dtype: Any = np.float32) -> Array:
    """What the elements of x are multiplied by, [m,k]."""
    one = np.eye(shape[1]).astype(dtype)
    x, W = np.ones(shape, dtype), np.zeros_like(one)
    mask: Array = t.dropout_forward(x, W, one, one, 1.0, p, seed)
    return mask


def _factors(t: Trial, p: Problem) -> tuple[Array, int]:
    """The mask, and how many roundings its factors are known to.

    A precision or a dtype that rounds what A is multiplied with has rounded the mask that is read
    off: there the factor is 1 / (1 - p), and is off by what 1 - p and its reciprocal lost."""
    mask = _mask(t, p.x.shape, p.p, p.seed, p.x.dtype)
    if p.x.dtype.itemsize > 2 and not moves.of_low(np.ones(1), t.precision).any():
        return mask, 4
    return np.where(mask == 0, 0.0, 1 / (1 - p.p)), 4 + math.ceil(4 / (1 - p.p))


def _values(t: Trial, p: Problem) -> None:
    mask = _mask(t, p.x.shape, p.p, p.seed, p.x.dtype)
    keep = 1 / (1 - p.p)
    want = np.where(mask == 0, 0.0, keep)
    # 1 - p and its reciprocal are rounded, p itself is given as float64 or rounded too.
    kind = bounds.kind(p.x)
    off = bounds.relative(4, "float64" if kind == "float64" else "float32") * keep / (1 - p.p)
    off = off + abs(keep - 1 / (1 - float(np.float32(p.p))))  # p MAY be a float32 (D-7)
    off = off + bounds.relative(0, kind, STORED + 3) * (keep + off)  # and h, the update, y
    off = off + float(moves.of_low(np.asarray(keep + off), t.precision))
    bound = np.where(mask == 0, 0.0, off)
    t.expect(f"what is left of ones with p = {p.p}", mask, want, bound)


def _expectation(t: Trial, p: Problem) -> None:
    mask = _mask(t, p.x.shape, p.p, p.seed, p.x.dtype)
    n, kept = mask.size, int((mask != 0).sum())
    off = abs(kept - n * (1 - p.p))
    # Hoeffding: P(|kept - n (1 - p)| >= e) <= 2 exp(-2 e² / n).
    allowed = math.sqrt(n * math.log(2 / UNLIKELY) / 2)
    if off > allowed:
        holds = f"abs(np.count_nonzero(RESULT) - {n * (1 - p.p)}) <= {allowed}"
        said = f"of {n} elements {kept} were kept with p = {p.p}; off by {off:.0f} > {allowed:.0f}"
        t.fail(said, mask, holds)


def _scattered(t: Trial, p: Problem) -> None:
    mask = _mask(t, p.x.shape, p.p, p.seed, p.x.dtype)
    kept = mask != 0
    if (kept == kept[:1]).all():
        t.fail("every row was given the same mask", mask, "(RESULT != RESULT[:1]).any()")
    if (kept == kept[:, :1]).all():
        t.fail("every column was given the same mask", mask, "(RESULT != RESULT[:, :1]).any()")
    other = _mask(t, p.x.shape, p.p, p.seed + 1, p.x.dtype)
    if (kept == (other != 0)).all():
        said = f"the seeds {p.seed} and {p.seed + 1} gave the same mask"
        t.fail(said, other, "(RESULT != result).any()")


def _forward(t: Trial, p: Problem) -> None:
    mask, extra = _factors(t, p)
    y = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, p.p, p.seed)
    W = t.weight(p.W)
    want = oracle.dropped(p.dy, p.x, mask, W, p.A, p.B, p.scale)[0]
    lora = [(p.A, p.B, p.scale / (1 - p.p))]  # every dropped element is at most x / (1 - p)
    bound = bounds.forward(p.x, W, lora, None, extra, t.precision, STORED)
    t.expect("y", y, want, bound)


def _backward(t: Trial, p: Problem) -> None:
    mask, extra = _factors(t, p)
    t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, p.p, p.seed)
    got = t.dropout_backward(p.dy, p.x, p.W, p.A, p.B, p.scale, p.p, p.seed)
    W = t.weight(p.W)
    want = oracle.dropped(p.dy, p.x, mask, W, p.A, p.B, p.scale)[1:]
    scale = p.scale / (1 - p.p)
    limits = bounds.backward(p.dy, p.x, W, p.A, p.B, scale, extra, t.precision, STORED)
    for name, g, w, bound in zip(("dx", "dA", "dB"), got, want, limits):
        t.expect(name, g, w, bound)


def _none(t: Trial, p: Problem) -> None:
    want = t.forward(p.x, p.W, p.A, p.B, p.scale)
    y = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, 0.0, p.seed % 1000)
    t.expect("y with p = 0 against forward", y, want, _slack(t, p, 0.0))


def _slack(t: Trial, p: Problem, rate: float) -> Array:
    """Zero where bits are promised, else twice the bound of the forward pass."""
    lora = [(p.A, p.B, p.scale / (1 - rate))]
    if t.bitwise:
        return np.zeros(())
    return 2 * bounds.forward(p.x, t.weight(p.W), lora, None, 4, t.precision, STORED)


def _repeat(t: Trial, p: Problem) -> None:
    y = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, p.p, p.seed).copy()
    t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, p.p, p.seed + 1)
    again = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, p.p, p.seed)
    t.expect("y of the same seed a second time", again, y, _slack(t, p, p.p))


# ---- initial values ------------------------------------------------------------------------------


def _inits() -> object:
    """At least eight elements in A, so that two seeds cannot give the same A by chance."""
    return st.builds(
        lambda d, k, r, seed, method: Problem(d=d, k=k, r=r, seed=seed, method=method),
        st.sampled_from((1, 2, 3, 8, 33)),
        st.sampled_from((8, 9, 33)),
        st.sampled_from((1, 2, 4, 40)),
        st.integers(0, 2**31 - 1),
        st.sampled_from(("kaiming", "gaussian")),
    )


def _init(t: Trial, p: Problem) -> tuple[Array, Array]:
    A, B = t.init(p.d, p.k, p.r, p.seed, p.method)
    return A, B


def _starts(t: Trial, p: Problem) -> None:
    A, B = _init(t, p)
    t.expect("B", B, np.zeros(B.shape))
    if not np.isfinite(A).all() or not (A != 0).any():
        holds = "np.isfinite(RESULT).all() and np.any(RESULT)"
        t.fail("A is all zeros or not finite, so nothing can be learned", A, holds)


def _seeded(t: Trial, p: Problem) -> None:
    A, _ = _init(t, p)
    A = A.copy()
    other, _ = t.init(p.d, p.k, p.r, p.seed + 1, p.method)
    again, _ = _init(t, p)
    t.expect("A of the same seed", again, A)
    if (np.asarray(other) == A).all():
        said = f"the seeds {p.seed} and {p.seed + 1} give the same A"
        t.fail(said, other, "(RESULT != result[0]).any()")


def _distribution(t: Trial, p: Problem) -> None:
    """Of n = r k >= 2048 elements: the range, the mean, and the mean of squares."""
    raw = t.init(3, p.k, p.r, p.seed, p.method)[0]
    A = np.asarray(raw, np.float64)
    n, limit = A.size, math.log(2 / UNLIKELY)
    if p.method == "kaiming":
        edge = 1 / math.sqrt(p.k)
        top = float(np.abs(A).max())
        if top > edge * (1 + bounds.relative(4, "float32")):
            holds = f"np.abs(RESULT).max() <= {edge * (1 + 1e-6)}"
            t.fail(f"|A| reaches {top}, beyond 1 / sqrt(k) = {edge}", raw, holds)
        # Hoeffding, for elements in ±edge and squares in 0 .. edge².
        mean_off, square_off = edge * math.sqrt(2 * limit / n), edge**2 * math.sqrt(limit / (2 * n))
        square = edge**2 / 3
    else:
        square = 1 / p.r**2
        # Gauss tail; Laurent & Massart 2000, lemma 1, for the sum of squares.
        mean_off = math.sqrt(2 * limit * square / n)
        square_off = square * (2 * math.sqrt(limit / n) + 2 * limit / n)
    if abs(A.mean()) > mean_off:
        said = f"the mean of {n} elements of A is {A.mean():.3g}, beyond ±{mean_off:.3g}"
        t.fail(said, raw, f"abs(RESULT.mean(dtype=float)) <= {mean_off}")
    got = float((A**2).mean())
    if abs(got - square) > square_off:
        said = f"the mean square of A is {got:.4g}, expected {square:.4g} ± {square_off:.2g}"
        t.fail(said, raw, f"abs((RESULT.astype(float) ** 2).mean() - {square}) <= {square_off}")


def _starts_as_base(t: Trial, p: Problem) -> None:
    (d, k), r = p.W.shape, p.A.shape[0]
    A, B = t.init(d, k, r, p.seed, "kaiming")
    A, B = np.asarray(A).astype(p.A.dtype), np.asarray(B).astype(p.B.dtype)
    y = t.forward(p.x, p.W, A, B, 2.0, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [], p.bias)
    t.expect("y with a fresh adapter", y, want, allowed.base(t, p))


def _big_inits() -> object:
    return st.builds(
        lambda k, r, seed, method: Problem(k=k, r=r, seed=seed, method=method),
        st.sampled_from((512, 768)),
        st.sampled_from((4, 8, 16)),
        st.integers(0, 2**31 - 1),
        st.sampled_from(("kaiming", "gaussian")),
    )


DROP = ("dropout_forward",)
LAWS = (
    Law(
        "P1",
        "Dropout keeps an element as x / (1 - p) or makes it zero.",
        "drop(1)[i,j] is 0 or 1 / (1 - p)",
        "kept elements are not scaled up, so training and inference differ",
        ("D-2",),
        DROP,
        dropout_problems,
        _values,
        (),
        dtypes=DTYPES,
    ),
    Law(
        "P2",
        "Dropout drops the share p.",
        "|kept - n (1 - p)| <= sqrt(n ln(2 / 10⁻¹⁸) / 2) (Hoeffding)",
        "p and 1 - p are exchanged, or dropout is off",
        ("D-2",),
        DROP,
        lambda dtype: dropout_problems(dtype, large=True),
        _expectation,
        (),
        dtypes=DTYPES,
    ),
    Law(
        "P3",
        "The mask differs between rows, columns and seeds.",
        "mask[i,:], mask[:,j] and masks of two seeds are not all equal (chance < 2⁻³⁰⁰)",
        "one mask is used for all tokens, or the generator is seeded anew each time",
        ("D-2", "D-5"),
        DROP,
        lambda dtype: dropout_problems(dtype, large=True),
        _scattered,
        (),
        dtypes=DTYPES,
    ),
    Law(
        "P4",
        "Dropout acts on the input of A alone.",
        "y = x Wᵀ + s (mask x) Aᵀ Bᵀ with the mask of P1, within F1's bound",
        "the base's input is dropped too, or h or the output is",
        ("D-1",),
        DROP,
        dropout_problems,
        _forward,
        ("x", "W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "P5",
        "The backward pass uses the forward pass's mask.",
        "dA = s (dy B)ᵀ (mask x), dB = s dyᵀ ((mask x) Aᵀ), dx = dy W + s mask (dy B) A, as in B1",
        "another mask is drawn, x is taken undropped, or dx goes without the mask",
        ("D-3",),
        ("dropout_forward", "dropout_backward"),
        dropout_problems,
        _backward,
        ("x", "W", "A", "B", "dy"),
        dtypes=DTYPES,
    ),
    Law(
        "P6",
        "Without dropout (p = 0) the result is the forward pass's.",
        "y(p = 0) = y; without a promise of bits, within twice F1's bound",
        "the path of training computes something else",
        ("D-4",),
        ("forward", "dropout_forward"),
        dropout_problems,
        _none,
        ("x", "W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "P7",
        "The same seed gives the same result.",
        "y(seed) = y(seed) after a call with another seed; tolerance as in P6",
        "a run cannot be repeated or resumed",
        ("D-5", "N-3"),
        DROP,
        dropout_problems,
        _repeat,
        ("x", "W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "I1",
        "An adapter starts with B = 0 and A ≠ 0.",
        "B = 0, A finite and not all zero",
        "the first step is not the base model, or nothing can be learned",
        ("I-1",),
        ("init",),
        _inits,
        _starts,
        (),
    ),
    Law(
        "I2",
        "Initial values depend on the seed, and on nothing else.",
        "init(seed) = init(seed), init(seed) ≠ init(seed + 1)",
        "a run cannot be repeated, or every run is the same",
        ("I-6",),
        ("init",),
        _inits,
        _seeded,
        (),
    ),
    Law(
        "I3",
        "A is distributed as its method says.",
        "Kaiming: uniform in ±1 / sqrt(k); gaussian: N(0, 1 / r²); mean and mean square within "
        "tails of chance 10⁻¹⁸",
        "the fan is taken from the wrong axis, or a variance for a deviation",
        ("I-2", "I-3"),
        ("init",),
        _big_inits,
        _distribution,
        (),
    ),
    Law(
        "I4",
        "A module with an adapter that was just made is the base.",
        "y(init) = x Wᵀ + bias, exact on small integers",
        "as I1",
        ("I-1", "F-2"),
        ("init", "forward"),
        exact_problems,
        _starts_as_base,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
)
