"""Laws of the backward pass, of the gradient of a loss over micro-batches, and of inputs.

"Exact" laws use small integers and powers of two and ask for equality; see laws_forward.
"""

from __future__ import annotations

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.bounds.layer import wide
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    KINDS,
    SEEDS,
    elements,
    exact_problems,
    integer_array,
    long_sums,
    lora_problems,
    pick,
    st,
)
from pylora.conformance.testcase import Problem, Trial

NAMES = ("dx", "dA", "dB")


def _agrees(t: Trial, p: Problem) -> None:
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    W = t.weight(p.W)
    want = oracle.backward(p.dy, p.x, W, p.A, p.B, p.scale)
    limits = bounds.backward(p.dy, p.x, W, p.A, p.B, p.scale, precision=t.precision)
    for name, g, w, bound in zip(NAMES, got, want, limits):
        t.expect(name, g, w, bound)


def _exact(t: Trial, p: Problem) -> None:
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    want = oracle.backward(p.dy, p.x, t.weight(p.W), p.A, p.B, p.scale)
    for name, g, w, off in zip(NAMES, got, want, allowed.backward(t, p)):
        t.expect(name, g, w, off)


def _of_its_forward(t: Trial, p: Problem) -> None:
    """y is linear in each of x, A and B, so a finite difference with step 1 is the derivative."""
    rng = np.random.default_rng(p.seed)
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    values = {"x": p.x, "A": p.A, "B": p.B}
    y = t.forward(p.x, p.W, p.A, p.B, p.scale).astype(np.float64)
    limits = allowed.backward(t, p)
    for name, gradient, limit in zip(("x", "A", "B"), got, limits):
        v = integer_array(rng, values[name].shape, 1, p.x.dtype)
        moved = {**values, name: values[name] + v}
        ahead = t.forward(moved["x"], p.W, moved["A"], moved["B"], p.scale).astype(np.float64)
        slope = float((p.dy.astype(np.float64) * (ahead - y)).sum())
        along = float((np.asarray(gradient, np.float64) * v).sum())
        what = f"derivative along a change of {name}: <d{name}, v> = {along} against"
        both = allowed.forward(t, p, bias=None) + allowed.forward(t, p, bias=None, **moved)
        off = float((np.abs(wide(p.dy)) * both).sum() + (limit * np.abs(wide(v))).sum())
        if abs(slope - along) > off:
            holds = f"(RESULT.astype(float) * np.array({v.tolist()})).sum() == {slope}"
            t.fail(f"{what} <dy, y({name} + v) - y({name})> = {slope}", gradient, holds)


def _complex_step(t: Trial, p: Problem) -> None:
    """Im f(x + i h v) / h is the derivative without any cancellation: h may be 1e-100."""
    rng, h = np.random.default_rng(p.seed), 1e-100
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    limits = bounds.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    fixed = [a.astype(np.complex128) for a in (p.x, p.W, p.A, p.B)]
    for which, name, gradient, bound in zip((0, 2, 3), "xAB", got, limits):
        v = rng.integers(-1, 2, gradient.shape).astype(np.float64)
        arrays = list(fixed)
        arrays[which] = arrays[which] + 1j * h * v
        y = t.forward(*arrays, p.scale)
        slope = float((p.dy * (y.imag / h)).sum())
        along = float((gradient * v).sum())
        # The bound of the gradient, once for each side, and the two sums of products.
        n = p.dy.size + gradient.size + 4
        size = _slope_size(p, name, np.abs(v))
        limit = 2 * float((bound * np.abs(v)).sum()) + 4 * bounds.relative(n, "float64") * size
        limit += bounds.smallest("float64") / h  # what underflow in the imaginary part comes to
        t.expect(f"<d{name}, v> against the complex step", np.asarray(along), slope, limit)


def _slope_size(p: Problem, name: str, v: np.ndarray) -> float:
    """The sum of the magnitudes of everything that <dy, dy/d(name) v> adds up."""
    X, A, B, D, W = (np.abs(a.astype(np.float64)) for a in (p.x, p.A, p.B, p.dy, p.W))
    if name == "x":
        return float((D * (v @ W.T + abs(p.scale) * (v @ A.T @ B.T))).sum())
    h = X @ v.T @ B.T if name == "A" else X @ A.T @ v.T
    return float((D * abs(p.scale) * h).sum())


def _no_gradient_to_W(t: Trial, p: Problem) -> None:
    got = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    if len(got) == 4 and got[3] is not None:
        dW = np.asarray(got[3])
        if dW.any():
            holds = "len(RESULT) == 3 or RESULT[3] is None or not np.any(RESULT[3])"
            t.fail(f"W has a gradient, up to {np.abs(dW).max()}", got, holds)


def _fresh(t: Trial, p: Problem) -> None:
    B = np.zeros_like(p.B)
    got = t.backward(p.dy, p.x, p.W, p.A, B, p.scale)
    want = oracle.backward(p.dy, p.x, t.weight(p.W), p.A, B, p.scale)
    for name, g, w, off in zip(NAMES, got, want, allowed.backward(t, p, B=B)):
        t.expect(f"{name} with B = 0", g, w, off)


def _linear_in_dy(t: Trial, p: Problem) -> None:
    other = integer_array(np.random.default_rng(p.seed), p.dy.shape, dtype=p.dy.dtype)
    one = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    two = t.backward(other, p.x, p.W, p.A, p.B, p.scale)
    both = t.backward(p.dy + other, p.x, p.W, p.A, p.B, p.scale)
    limits = [allowed.backward(t, p, dy=dy) for dy in (p.dy, other, p.dy + other)]
    for i, name in enumerate(NAMES):
        off = sum(limit[i] for limit in limits)
        t.expect(f"{name} of dy1 + dy2", both[i], wide(one[i]) + wide(two[i]), off)


def _parts(t: Trial, p: Problem) -> None:
    m = p.x.shape[0]
    cut = p.seed % (m + 1)
    whole = t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)
    one = t.backward(p.dy[:cut], p.x[:cut], p.W, p.A, p.B, p.scale)
    two = t.backward(p.dy[cut:], p.x[cut:], p.W, p.A, p.B, p.scale)
    off = [2 * limit for limit in allowed.backward(t, p)]  # the parts' bounds add up to at most it
    t.expect("dA of the batch against its parts'", whole[1], wide(one[1]) + wide(two[1]), off[1])
    t.expect("dB of the batch against its parts'", whole[2], wide(one[2]) + wide(two[2]), off[2])
    side = np.concatenate([one[0], two[0]])
    t.expect("dx of the batch against its parts'", whole[0], side, off[0])


def _empty(t: Trial, p: Problem) -> None:
    got = t.backward(p.dy[:0], p.x[:0], p.W, p.A, p.B, p.scale)
    for name, g, like in zip(NAMES, got, (p.x[:0], p.A, p.B)):
        t.expect(f"{name} of no tokens", g, np.zeros(like.shape))


def _nan_stays(t: Trial, p: Problem) -> None:
    rng, (m, d) = np.random.default_rng(p.seed), p.dy.shape
    if m == 0:
        return
    dy, i = p.dy.copy(), int(rng.integers(m))
    dy[i, int(rng.integers(d))] = np.nan
    got = t.backward(dy, p.x, p.W, p.A, p.B, p.scale)
    others = np.delete(np.arange(m), i)
    want = oracle.backward(p.dy, p.x, t.weight(p.W), p.A, p.B, p.scale)[0]
    off = allowed.at(allowed.backward(t, p)[0], others)
    what = f"dx of rows other than {i}, where dy has NaN"
    t.expect(what, got[0], want[others], off, at=others)


_BATCHES = st.lists(st.sampled_from((1, 2, 3, 0, 7)), min_size=1, max_size=4)


@st.composite  # type: ignore[untyped-decorator]
def micro_batches(draw, dtype: str = "float32") -> Problem:  # type: ignore[no-untyped-def]
    """1 to 4 micro-batches of different length, some of whose rows are not counted."""
    k, d = draw(pick((1, 2, 5, 16))), draw(pick((1, 2, 5, 16)))
    r = draw(pick((1, 2, 8)))
    sizes = draw(_BATCHES)
    rng = np.random.default_rng(draw(SEEDS))
    share = draw(pick((1.0, 0.6, 0.2)))
    kind = draw(pick(KINDS))

    def make(*shape: int) -> np.ndarray:
        a: np.ndarray = elements(rng, shape, kind, dtype)
        return a

    batches = [(make(m, k), make(m, d), rng.random(m) < share) for m in sizes]
    if not any(c.any() for _, _, c in batches):  # a mean over nothing is not defined
        batches.append((make(1, k), make(1, d), np.ones(1, bool)))
    scale = draw(pick((1.0, 2.0, -0.5)))
    return Problem(batches=batches, W=make(d, k), A=make(r, k), B=make(d, r), scale=scale)


def _accumulation(t: Trial, p: Problem) -> None:
    got = t.loss_gradients(p.batches, p.W, p.A, p.B, p.scale)
    W = t.weight(p.W)
    want = oracle.loss_gradients(p.batches, W, p.A, p.B, p.scale)
    limits = bounds.loss_gradients(p.batches, W, p.A, p.B, p.scale, t.precision)
    for name, g, w, bound in zip(NAMES[1:], got, want, limits):
        t.expect(f"{name} of {len(p.batches)} micro-batches", g, w, bound)


def _inputs_unchanged(t: Trial, p: Problem) -> None:
    given = {"x": p.x, "W": p.W, "A": p.A, "B": p.B, "dy": p.dy}
    before = {name: a.copy() for name, a in given.items()}
    t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    _same(t, "forward", given, before)
    for method, arguments in (
        ("backward", (p.dy, p.x, p.W, p.A, p.B, p.scale)),
        ("merge", (p.W, p.A, p.B, p.scale)),
        ("dropout_forward", (p.x, p.W, p.A, p.B, p.scale, 0.5, 1)),
        ("dropout_backward", (p.dy, p.x, p.W, p.A, p.B, p.scale, 0.5, 1)),
        ("forward_stacked", (p.x, p.W, [(p.A, p.B, p.scale)] * 2)),
        ("forward_mixed", (p.x, p.W, [(p.A, p.B, p.scale)], np.arange(len(p.x)) % 2 - 1)),
    ):
        if callable(getattr(t.implementation, method, None)):
            getattr(t, method)(*arguments)
            _same(t, method, given, before)


def _same(t: Trial, method: str, given: dict, before: dict) -> None:  # type: ignore[type-arg]
    for name, a in given.items():
        t.expect(f"{name} after {method}, which wrote to it,", a, before[name], signs=True)


def _results_are_own(t: Trial, p: Problem) -> None:
    first = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    kept = first.copy()
    t.forward(p.x + p.x.dtype.type(1), p.W, p.A, p.B, p.scale, p.bias)
    t.expect("the first result, after a second call,", first, kept)
    if first.size and first.flags.writeable:
        first[...] = 0
        again = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
        t.expect("y after the caller overwrote an earlier result", again, kept)


LAWS = (
    Law(
        "B1",
        "The gradients agree with the formulas (float32).",
        "dx = dy W + s (dy B) A, dA = s (dy B)ᵀ x, dB = s dyᵀ (x Aᵀ), within gamma of each chain",
        "a wrong, missing or doubled factor in a gradient: it trains, badly",
        ("B-1", "S-3", "N-1", "N-6"),
        ("backward", "float32"),
        lora_problems,
        _agrees,
    ),
    Law(
        "B2",
        "On small integers the gradients are exact.",
        "as B1, with equality",
        "as B1; also products in TF32 or a 16-bit format",
        ("B-1", "S-3", "N-2"),
        ("backward",),
        exact_problems,
        _exact,
        dtypes=DTYPES,
    ),
    Law(
        "B3",
        "The gradients are those of the implementation's own forward pass.",
        "<dy, y(A + V) - y(A)> = <dA, V>, also for x and B, exact: y is linear in each",
        "forward and backward disagree, whatever the formula is",
        ("B-1",),
        ("forward", "backward"),
        lambda dtype: exact_problems(dtype, features=(1, 2, 3, 7, 16), ranks=(1, 2, 3, 8)),
        _of_its_forward,
        dtypes=DTYPES,
    ),
    Law(
        "B4",
        "The gradients agree with the formulas (float64).",
        "as B1, with u = 2⁻⁵³",
        "something is computed in float32 although the inputs are float64",
        ("B-1", "N-1"),
        ("backward", "float64"),
        lambda: lora_problems(dtype="float64"),
        _agrees,
    ),
    Law(
        "B5",
        "The gradients agree with the formulas (bfloat16, accumulated in float32).",
        "as B1, with gamma of float32 for sums and gamma_6 of bfloat16 for what is stored",
        "sums are accumulated in bfloat16",
        ("B-1", "N-1", "N-2"),
        ("backward", "bfloat16"),
        lambda: st.one_of(lora_problems(dtype="bfloat16"), long_sums(dtype="bfloat16")),
        _agrees,
    ),
    Law(
        "B6",
        "Sums of gradients over thousands of terms keep their bound.",
        "as B1, with m, k, d or r beyond 600 and all terms of one sign",
        "an accumulator narrower than float32 that stands still",
        ("N-1", "N-2"),
        ("backward",),
        long_sums,
        _agrees,
        dtypes=DTYPES,
    ),
    Law(
        "B7",
        "The gradients are those of the complex step (float64).",
        "<dA, V> = Re <dy, Im y(A + i h V) / h>, h = 10⁻¹⁰⁰, also for x and B",
        "as B3, to the last digits of float64",
        ("B-1",),
        ("forward", "backward", "float64", "complex128"),
        lambda: _with_seed(
            lora_problems(
                dtype="float64",
                tokens=(1, 2, 5),
                features=(1, 2, 3, 8, 16),
                ranks=(1, 2, 8),
                kinds=("normal", "integers", "positive"),
                layouts=("C",),
            )
        ),
        _complex_step,
    ),
    Law(
        "B8",
        "The frozen weight gets no gradient.",
        "dW is None or zero",
        "the base model is trained too, or memory for its gradient is spent",
        ("B-2",),
        ("backward",),
        exact_problems,
        _no_gradient_to_W,
        dtypes=DTYPES,
    ),
    Law(
        "B9",
        "A fresh adapter (B = 0) has dA = 0, dx = dy W, and a dB that lets it start.",
        "B = 0 implies dA = 0, dx = dy W, dB = s dyᵀ (x Aᵀ), exact",
        "training cannot start, or starts wrongly",
        ("B-4",),
        ("backward",),
        exact_problems,
        _fresh,
        dtypes=DTYPES,
    ),
    Law(
        "B10",
        "The gradients are linear in dy.",
        "gradients(dy₁ + dy₂) = gradients(dy₁) + gradients(dy₂), exact",
        "gradients are clipped, normalised or kept from an earlier call",
        ("B-1",),
        ("backward",),
        exact_problems,
        _linear_in_dy,
        dtypes=DTYPES,
    ),
    Law(
        "B11",
        "The gradients of a batch are the sum of those of its parts.",
        "dA(x₁; x₂) = dA(x₁) + dA(x₂), dB too; dx side by side, exact",
        "a mean over rows hides in the backward pass, or rows are lost",
        ("B-8", "B-7"),
        ("backward",),
        exact_problems,
        _parts,
        dtypes=DTYPES,
    ),
    Law(
        "B12",
        "No tokens give zero gradients.",
        "m = 0 implies dA = 0, dB = 0, dx is [0, k]",
        "an empty batch fails, or leaves memory that was not written",
        ("B-3", "F-6"),
        ("backward",),
        exact_problems,
        _empty,
        dtypes=DTYPES,
    ),
    Law(
        "B13",
        "NaN in one row of dy stays in that row of dx.",
        "dy[i,j] = NaN implies dx[l,:] for l ≠ i is as without it",
        "rows are mixed on the way back",
        ("B-7", "N-5"),
        ("backward",),
        exact_problems,
        _nan_stays,
        dtypes=DTYPES,
    ),
    Law(
        "O1",
        "The gradient of a step is that of the mean over all counted tokens of all micro-batches.",
        "dA, dB of Σ |y - target|² / 2 / (counted rows of all batches), within the bound",
        "a mean of means: short micro-batches weigh too much (gradient accumulation)",
        ("O-1", "B-8"),
        ("loss_gradients",),
        micro_batches,
        _accumulation,
        ("W", "A", "B"),
        dtypes=DTYPES,
    ),
    Law(
        "N1",
        "Inputs are not written to.",
        "x, W, A, B, dy have the same bits after each call",
        "an in-place operation destroys the caller's arrays, W above all",
        ("F-8", "M-4"),
        ("forward",),
        lambda dtype: exact_problems(dtype, features=(1, 2, 3, 7, 16)),
        _inputs_unchanged,
        dtypes=DTYPES,
    ),
    Law(
        "N2",
        "Results are the caller's: no later call changes them.",
        "y keeps its bits after another call, and a call does not read what the caller did to y",
        "a buffer or a cache of results is shared between calls",
        ("N-3",),
        ("forward",),
        lambda dtype: exact_problems(dtype, features=(1, 2, 3, 7, 16)),
        _results_are_own,
        dtypes=DTYPES,
    ),
)


def _with_seed(problems: object) -> object:
    seeds = st.integers(0, 2**16)
    return st.builds(lambda p, seed: p.replaced(seed=seed), problems, seeds)
