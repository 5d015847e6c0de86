"""Laws of the forward pass and of the scale.

Laws named "exact" use small integers and powers of two, where every order of summation gives the
same bits: they ask for equality. The others ask for the derived bound.
"""

from __future__ import annotations

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.bounds import moves
from pylora.conformance.bounds.layer import wide
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    exact_problems,
    integer_array,
    long_sums,
    lora_problems,
    st,
)
from pylora.conformance.problems.sizes import LIMITS, walk
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array


def _agrees(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    lora, W = [(p.A, p.B, p.scale)], t.weight(p.W)
    bound = bounds.forward(p.x, W, lora, p.bias, precision=t.precision)
    t.expect("y", y, oracle.forward(p.x, W, lora, p.bias), bound)


def _exact(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, p.scale)], p.bias)
    t.expect("y", y, want, allowed.forward(t, p))


def _zero_init(t: Trial, p: Problem) -> None:
    y = t.forward(p.x, p.W, p.A, np.zeros_like(p.B), p.scale, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [], p.bias)
    t.expect("y with B = 0", y, want, allowed.base(t, p))


def _zero_init_bits(t: Trial, p: Problem) -> None:
    want = t.base(p.x, p.W, p.bias)
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    bound: Array | float = 0.0
    if not t.bitwise:
        bound = 2 * bounds.forward(p.x, t.weight(p.W), [], p.bias, precision=t.precision)
    t.expect("y with B = 0 against the base", y, want, bound, signs=t.bitwise)


def _zero_init_odd(t: Trial, p: Problem) -> None:
    A = p.A.copy()
    A.reshape(-1)[p.seed % A.size] = (np.nan, np.inf, -np.inf)[p.seed % 3]
    y = t.forward(p.x, p.W, A, np.zeros_like(p.B), p.scale, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [], p.bias)
    t.expect("y with B = 0, not all of A finite", y, want, allowed.base(t, p))


def _linear_in_scale(t: Trial, p: Problem) -> None:
    a, b = p.scale, 3.0 * p.scale + 1.0
    parts = [t.forward(p.x, p.W, p.A, p.B, s, p.bias) for s in (0.0, a, b)]
    both = t.forward(p.x, p.W, p.A, p.B, a + b, p.bias)
    off = sum(allowed.forward(t, p, scale=s) for s in (0.0, a, b, a + b))
    zero, one, two = (wide(y) for y in parts)
    t.expect("y(a + b) against y(a) + y(b) - y(0)", both, one + two - zero, off)


def _bias_once(t: Trial, p: Problem) -> None:
    bias = integer_array(np.random.default_rng(p.seed), (p.W.shape[0],), dtype=p.x.dtype)
    without = t.forward(p.x, p.W, p.A, p.B, p.scale)
    y = t.forward(p.x, p.W, p.A, p.B, p.scale, bias)
    off = allowed.forward(t, p, bias=None) + allowed.forward(t, p, bias=bias)
    t.expect("y with bias against y without, plus the bias", y, wide(without) + wide(bias), off)


def _linear_in_x(t: Trial, p: Problem) -> None:
    other = integer_array(np.random.default_rng(p.seed), p.x.shape, dtype=p.x.dtype)
    y1 = t.forward(p.x, p.W, p.A, p.B, p.scale)
    y2 = t.forward(other, p.W, p.A, p.B, p.scale)
    y = t.forward(p.x + other, p.W, p.A, p.B, p.scale)
    off = sum(allowed.forward(t, p, x=x, bias=None) for x in (p.x, other, p.x + other))
    t.expect("y(x1 + x2) against y(x1) + y(x2)", y, wide(y1) + wide(y2), off)


def _gauge(t: Trial, p: Problem) -> None:
    rng, r = np.random.default_rng(p.seed), p.A.shape[0]
    order, power = rng.permutation(r), (2.0 ** rng.integers(-1, 2, r)).astype(p.A.dtype)
    A, B = (p.A * power[:, None])[order], (p.B / power)[:, order]
    if r > 1:  # and a shear: A's row i gains row j, B's column j loses column i
        i, j = int(order[0]), int(order[1])
        A[i], B[:, j] = A[i] + A[j], B[:, j] - B[:, i]
    want = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    y = t.forward(p.x, p.W, A, B, p.scale, p.bias)
    off = allowed.forward(t, p) + allowed.forward(t, p, A=A, B=B)
    t.expect("y of (G A, B G⁻¹) against y of (A, B)", y, want, off)


def _padding(t: Trial, p: Problem) -> None:
    rng = np.random.default_rng(p.seed)
    n = int(rng.integers(1, 9))
    A = np.concatenate([p.A, integer_array(rng, (n, p.A.shape[1]), dtype=p.A.dtype)])
    B = np.concatenate([p.B, np.zeros((p.B.shape[0], n), p.B.dtype)], axis=1)
    want = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    y = t.forward(p.x, p.W, A, B, p.scale, p.bias)
    off = allowed.forward(t, p) + allowed.forward(t, p, A=A, B=B)
    t.expect(f"y with {n} more ranks whose columns of B are zero", y, want, off)


def _concatenation(t: Trial, p: Problem) -> None:
    rng = np.random.default_rng(p.seed)
    r2, k, d = int(rng.integers(1, 5)), p.A.shape[1], p.B.shape[0]
    A2, B2 = (integer_array(rng, shape, dtype=p.A.dtype) for shape in ((r2, k), (d, r2)))
    s2 = 2.0
    y1 = t.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)
    y2 = t.forward(p.x, p.W, A2, B2, s2, p.bias)
    scaled = p.B * p.B.dtype.type(p.scale), B2 * B2.dtype.type(2)
    A, B = np.concatenate([p.A, A2]), np.concatenate(scaled, axis=1)
    y = t.forward(p.x, p.W, A, B, 1.0, p.bias)
    base = oracle.forward(p.x, t.weight(p.W), [], p.bias)
    parts = (p.A, p.B, p.scale), (A2, B2, s2), (A, B, 1.0)
    off = sum(allowed.forward(t, p, A=a, B=b, scale=s) for a, b, s in parts)
    t.expect("y of the adapters concatenated along the rank", y, wide(y1) + wide(y2) - base, off)


def _empty(t: Trial, p: Problem) -> None:
    y = t.forward(p.x[:0], p.W, p.A, p.B, p.scale, p.bias)
    t.expect("y of no tokens", y, np.zeros((0, p.W.shape[0])))


def _nan_stays(t: Trial, p: Problem) -> None:
    rng, (m, k) = np.random.default_rng(p.seed), p.x.shape
    if m == 0:
        return
    x, i, j = p.x.copy(), int(rng.integers(m)), int(rng.integers(k))
    x[i, j] = (np.nan, np.inf, -np.inf)[int(rng.integers(3))]
    y = t.forward(x, p.W, p.A, p.B, p.scale, p.bias)
    want = oracle.forward(p.x, t.weight(p.W), [(p.A, p.B, p.scale)], p.bias)
    others = np.delete(np.arange(m), i)
    off = allowed.at(allowed.forward(t, p), others)
    t.expect(f"rows other than {i}, where x has {x[i, j]}", y, want[others], off, at=others)
    if np.isnan(x[i, j]):
        t.expect(f"row {i}, where x has NaN", y, np.full_like(y[i], np.nan), at=i)


def _scale_rule(use_rslora: bool) -> Law:
    def check(t: Trial, p: Problem) -> None:
        got = t.scaling(p.alpha, p.r, use_rslora)
        want = p.alpha / np.sqrt(p.r) if use_rslora else p.alpha / p.r
        # float32 throughout: alpha, sqrt(r), and the quotient are rounded.
        bound = bounds.relative(4, "float32") * abs(want)
        t.expect(f"scaling(alpha={p.alpha}, r={p.r}, use_rslora={use_rslora})", got, want, bound)

    def problems() -> object:
        alphas = st.sampled_from((16, 1, 8.0, 32, 0.5, 3, 1e-3, 100))
        ranks = st.sampled_from((8, 1, 2, 3, 4, 16, 64, 100, 257))
        return st.builds(lambda alpha, r: Problem(alpha=alpha, r=r), alphas, ranks)

    def covering(dtype: str, examples: int) -> list[Problem]:
        return [
            Problem(alpha=alpha, r=r) for alpha in (16, 3.5) for r in walk(examples, LIMITS[-1])
        ]

    return Law(
        "S2" if use_rslora else "S1",
        "With rsLoRA the scale is alpha over the root of the rank."
        if use_rslora
        else "The scale is alpha over the rank.",
        "s = alpha / sqrt(r)" if use_rslora else "s = alpha / r",
        "alpha taken for the scale, or use_rslora ignored: the adapter is too strong or too weak",
        ("S-1",),
        ("scaling",),
        problems,
        check,
        covering=covering,
    )


def _stored(t: Trial, p: Problem) -> None:
    kept = t.call(t.implementation, "implementation", "stored", (p.W,))
    t.expect("the stored weight", kept, p.W, moves.stored(p.W, t.precision))


LAWS = (
    _scale_rule(False),
    _scale_rule(True),
    Law(
        "F1",
        "The forward pass agrees with the formula (float32).",
        "|y - (x Wᵀ + bias + s (x Aᵀ) Bᵀ)| <= gamma_{k+r+5} (|x||W|ᵀ + |bias| + |s||x||A|ᵀ|B|ᵀ)",
        "a wrong product, order, scale or stride, or sums narrower than float32",
        ("F-1", "F-6", "S-3", "S-4", "N-1", "N-6"),
        ("forward", "float32"),
        lora_problems,
        _agrees,
    ),
    Law(
        "F2",
        "On small integers the forward pass is exact.",
        "y = x Wᵀ + bias + s (x Aᵀ) Bᵀ, with equality",
        "any term lost, added twice or scaled wrongly; products in TF32 or a 16-bit format",
        ("F-1", "S-3", "N-2"),
        ("forward",),
        exact_problems,
        _exact,
        dtypes=DTYPES,
    ),
    Law(
        "F3",
        "Sums of thousands of terms keep their bound .",
        "as F1, with k or r beyond 600 and all terms of one sign",
        "an accumulator narrower than float32 that stands still",
        ("N-1", "N-2"),
        ("forward",),
        long_sums,
        _agrees,
        dtypes=DTYPES,
    ),
    Law(
        "F4",
        "The forward pass agrees with the formula (float64).",
        "as F1, with u = 2⁻⁵³",
        "something is computed in float32 although the inputs are float64",
        ("F-1", "N-1"),
        ("forward", "float64"),
        lambda: lora_problems(dtype="float64"),
        _agrees,
    ),
    Law(
        "F5",
        "The forward pass agrees with the formula (bfloat16, accumulated in float32).",
        "as F1, with gamma_{k+r+5} of float32 and gamma_6 of bfloat16 for what is stored",
        "sums are accumulated in bfloat16",
        ("F-1", "N-1", "N-2"),
        ("forward", "bfloat16"),
        lambda: st.one_of(lora_problems(dtype="bfloat16"), long_sums(dtype="bfloat16")),
        _agrees,
    ),
    Law(
        "F6",
        "A fresh adapter (B = 0) is the identity.",
        "B = 0 implies y = x Wᵀ + bias exactly, for any A and s, on small integers",
        "the adapter changes the model before it has learned anything",
        ("F-2", "I-1"),
        ("forward",),
        exact_problems,
        _zero_init,
        dtypes=DTYPES,
    ),
    Law(
        "F7",
        "A fresh adapter gives the base's bits, signs of zeros included, where bits are promised.",
        "B = 0 implies that y has the bits of base(x); without the promise, twice F1's bound",
        "zeros are added (-0 becomes +0), or the base is computed another way beside an adapter",
        ("F-2", "V-6"),
        ("forward", "base"),
        lambda dtype: lora_problems(dtype, zero_B=True),
        _zero_init_bits,
        dtypes=DTYPES,
    ),
    Law(
        "F11",
        "A fresh adapter is left out altogether: not even NaN in A reaches the result.",
        "B = 0 implies y = x Wᵀ + bias, for any A, NaN and infinities included",
        "B = 0 is multiplied out: an h that overflows makes NaN of 0 · inf, and -0.0 becomes 0.0",
        ("F-2",),
        # Frameworks multiply out what is zero, so this is asked of who promises bits.
        ("forward", "bitwise"),
        exact_problems,
        _zero_init_odd,
        dtypes=DTYPES,
    ),
    Law(
        "F8",
        "The update is linear in the scale.",
        "y(a + b) = y(a) + y(b) - y(0), exact",
        "the scale enters squared, is clipped, divided by r again, or left out for some values",
        ("S-3", "S-4"),
        ("forward",),
        exact_problems,
        _linear_in_scale,
        dtypes=DTYPES,
    ),
    Law(
        "F9",
        "The bias is added once and is not scaled.",
        "y(bias) = y(no bias) + bias, exact",
        "the bias is scaled, sent through the adapter, or added with each adapter",
        ("F-3",),
        ("forward",),
        exact_problems,
        _bias_once,
        dtypes=DTYPES,
    ),
    Law(
        "F10",
        "The module is linear in x.",
        "y(x₁ + x₂) = y(x₁) + y(x₂) without bias, exact",
        "something beside the products acts on x",
        ("F-1",),
        ("forward",),
        exact_problems,
        _linear_in_x,
        dtypes=DTYPES,
    ),
    Law(
        "G1",
        "Only the product B A matters (gauge invariance).",
        "y(G A, B G⁻¹) = y(A, B), G a permutation, powers of two and a shear, exact",
        "A or B acts in another way than through B A",
        ("F-1",),
        ("forward",),
        lambda dtype: exact_problems(
            dtype, features=(1, 2, 3, 7, 16), ranks=(1, 2, 3, 8), scales=(1.0, 2.0, 0.5, -1.0)
        ),
        _gauge,
        dtypes=DTYPES,
    ),
    Law(
        "G2",
        "Ranks whose columns of B are zero change nothing.",
        "y([A; A'], [B, 0], s) = y(A, B, s), exact",
        "the scale is computed from the rank of the arrays, though s is given",
        ("F-1", "S-3"),
        ("forward",),
        exact_problems,
        _padding,
        dtypes=DTYPES,
    ),
    Law(
        "G3",
        "Adapters concatenated along the rank are the sum of the adapters.",
        "y([A₁; A₂], [s₁B₁, s₂B₂], 1) - base = Σ (y(Aᵢ, Bᵢ, sᵢ) - base), exact",
        "the rank is truncated, or adapters influence each other",
        ("X-2",),
        ("forward",),
        lambda dtype: exact_problems(dtype, features=(1, 2, 3, 7, 16, 33)),
        _concatenation,
        dtypes=DTYPES,
    ),
    Law(
        "E1",
        "No tokens give no rows.",
        "m = 0 implies y is [0, d]",
        "an empty batch fails, which the last part of a split batch may be",
        ("F-6",),
        ("forward",),
        exact_problems,
        _empty,
        dtypes=DTYPES,
    ),
    Law(
        "E2",
        "NaN and infinity stay in their row, and NaN shows there.",
        "x[i,j] = NaN implies y[i,:] = NaN; y[l,:] for l ≠ i is as without it",
        "one bad token spoils a batch, or is hidden",
        ("F-7", "N-5"),
        ("forward",),
        exact_problems,
        _nan_stays,
        dtypes=DTYPES,
    ),
    Law(
        "Q1",
        "A weight that is stored in fewer bits is within half a step of its source.",
        "|stored(W) - W| <= u_bf16 |W|, u_bf16² |W| (fp32x3), or half of max|W| / 127 (int8), "
        "(max - min) / 15 (int4) of each group of 32, and what float16 loses of scale and minimum; "
        "fp32: equal",
        "codes are cut off in place of rounded, or a scale belongs to another group",
        ("N-7",),
        ("stored", "float32"),
        lora_problems,
        _stored,
        ("W",),
    ),
)
