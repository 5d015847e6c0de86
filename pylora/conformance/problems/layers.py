"""Hypothesis strategies: everything that a layer with LoRA may meet.

Shapes and kinds are drawn by hypothesis, so that it shrinks them; the elements come from NumPy
with a drawn seed, and running/shrink.py simplifies them afterwards. Magnitudes are chosen so that
no product of the laws overflows: an overflow says nothing about an implementation.

    @given(lora_problems())
    def test_mine(problem): y = mine(problem.x, problem.W, problem.A, problem.B, problem.scale)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.problems.layouts import LAYOUTS, laid_out
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Problem
from pylora.extras import need
from pylora.types import Array

st = need("hypothesis.strategies")

TOKENS = (1, 2, 3, 5, 8, 0, 17, 33)  # the first is what shrinking goes to
FEATURES = (1, 2, 3, 4, 7, 8, 16, 31, 33, 64, 130)
RANKS = (1, 2, 3, 4, 8, 17, 40)
SCALES = (1.0, 2.0, 0.5, -1.0, 0.0, 16.0, -0.375, 1 / 3, 2.8284271247461903, 1e-3, 100.0)
EXACT_SCALES = (1.0, 2.0, 0.5, -1.0, 0.0, -2.0, 0.25, 4.0)
# Kinds of elements. "ones" makes all roundings go the same way; "wide" spreads over 40 powers of 2.
KINDS = ("normal", "integers", "ones", "wide", "zeros", "tiny", "subnormal", "huge", "positive")
DTYPES = ("float32", "float64", "bfloat16", "float16")  # each law of a layer runs in all of them
FINE = 2.0**-26  # a step beside which an integer needs more digits than float32 has


def np_dtype(name: str) -> Any:
    """The NumPy dtype of a name of the protocol; bfloat16 is that of ml_dtypes."""
    return np.dtype(need("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def elements(rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: str) -> Array:
    """An array of one of KINDS."""
    if kind == "integers":
        a = rng.integers(-4, 5, shape).astype(np.float64)
    elif kind == "ones":
        a = np.ones(shape)
    elif kind == "positive":
        a = rng.uniform(0.5, 1.5, shape)
    else:
        a = rng.normal(size=shape)
    if kind == "wide":
        spread = 3 if dtype == "float16" else 20
        a = a * 2.0 ** rng.integers(-spread, spread + 1, shape)
    elif kind == "zeros":
        a = np.where(rng.random(shape) < 0.6, np.where(rng.random(shape) < 0.5, 0.0, -0.0), a)
    elif kind == "tiny":
        a = a * 2.0 ** {"float64": -300, "float16": -8}.get(dtype, -48)
    elif kind == "subnormal":
        a = a * 2.0 ** {"float64": -1024, "float16": -16}.get(dtype, -128)
    elif kind == "huge":
        a = a * 2.0 ** {"float16": 3}.get(dtype, 24)
    return a.astype(np_dtype(dtype))


_CHOICES: dict[str, Any] = {}


def pick(options: tuple[Any, ...]) -> Any:
    """st.sampled_from, made once for these options: hypothesis looks a strategy through when it
    meets it first, which takes longer than to draw from it. (1, 2) is not (1.0, 2.0) here."""
    key = repr(options)
    if key not in _CHOICES:
        _CHOICES[key] = st.sampled_from(options)
    return _CHOICES[key]


SEEDS, _SMALL_SEEDS = st.integers(0, 2**32 - 1), st.integers(0, 2**16)
_EITHER, _FEW = st.booleans(), st.integers(1, 6)
_LENGTHS = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def _sizes(draw: Any, tokens: Any, features: Any, ranks: Any) -> tuple[int, int, int, int]:
    return draw(pick(tokens)), draw(pick(features)), draw(pick(features)), draw(pick(ranks))


def _rng(draw: Any) -> np.random.Generator:
    return np.random.default_rng(draw(SEEDS))


@st.composite  # type: ignore[untyped-decorator]
def lora_problems(
    draw: Any,
    dtype: str = "float32",
    tokens: tuple[int, ...] = TOKENS,
    features: tuple[int, ...] = FEATURES,
    ranks: tuple[int, ...] = RANKS,
    kinds: tuple[str, ...] = KINDS,
    layouts: tuple[str, ...] = ("C", *LAYOUTS),
    zero_B: bool = False,
) -> Problem:
    """x [m,k], W [d,k], A [r,k], B [d,r], scale, bias [d] or None, dy [m,d].

    Small and large shapes, r > min(d, k), every kind of element and layout in memory, rows of
    zeros, -0. `zero_B`: B is all zeros, as it starts.
    """
    m, k, d, r = _sizes(draw, tokens, features, ranks)
    rng = _rng(draw)
    shapes = {"x": (m, k), "W": (d, k), "A": (r, k), "B": (d, r), "dy": (m, d)}
    # One kind for all, or one of each: a single odd array is not to hide behind three others.
    common = draw(pick(("each", *kinds)))
    fields: dict[str, Any] = {}
    plain = draw(_EITHER)
    for name, shape in shapes.items():
        kind = draw(pick(kinds)) if common == "each" else common
        a = elements(rng, shape, kind, dtype)
        if name in ("x", "dy") and m and not plain and rng.random() < 0.3:
            a[rng.random(m) < 0.4] = -0.0 if rng.random() < 0.5 else 0.0
        layout = "C" if plain else draw(pick(layouts))
        fields[name] = laid_out(a, layout)
    if zero_B:
        fields["B"] = np.zeros_like(fields["B"])
    scale = draw(pick(SCALES))
    kind = draw(pick((None, *kinds)))
    bias = None if kind is None else elements(rng, (d,), kind, dtype)
    return Problem(**fields, scale=scale, bias=bias)


@st.composite  # type: ignore[untyped-decorator]
def long_sums(draw: Any, dtype: str = "float32") -> Problem:
    """Problems whose sums have a thousand and more terms of one sign: where an accumulator that is
    too narrow stands still."""
    where = draw(pick(("k", "r", "d", "m")))
    n = draw(pick((600, 1030, 2049)))
    sizes = {"m": 2, "k": 3, "d": 2, "r": 1, where: n}
    m, k, d, r = (sizes[c] for c in "mkdr")
    rng, kind = _rng(draw), draw(pick(("ones", "positive")))

    def make(*shape: int) -> Array:
        return elements(rng, shape, kind, dtype)

    return Problem(
        x=make(m, k), W=make(d, k), A=make(r, k), B=make(d, r), dy=make(m, d), scale=1.0, bias=None
    )


def integer_array(
    rng: np.random.Generator, shape: tuple[int, ...], limit: int = 3, dtype: Any = "float32"
) -> Array:
    """Integers, about a third of them zero; -1, 0 and 1 in dtypes of 16 bits."""
    kind = np_dtype(dtype) if isinstance(dtype, str) else dtype
    limit = 1 if kind.itemsize == 2 else limit
    whole = rng.integers(-limit, limit + 1, shape) * (rng.random(shape) < 0.8)
    return whole.astype(np.float32).astype(kind)


# Arrays of which no two are factors of one product in y, dx or W': one group may carry steps of
# FINE beside its integers, and every sum is still exact in float64, but not in float32.
_CARRIERS = ((), ("W", "A", "bias"), ("x",), ("dy",), ("B",))
_NARROW = {"features": (1, 2, 3, 4, 7, 16, 33), "ranks": (1, 2, 3, 8)}  # sums within 8 bits, mostly


@st.composite  # type: ignore[untyped-decorator]
def exact_problems(
    draw: Any,
    dtype: str = "float32",
    tokens: tuple[int, ...] = (1, 2, 3, 5, 0, 16),
    features: tuple[int, ...] = (1, 2, 3, 4, 7, 16, 33, 64),
    ranks: tuple[int, ...] = (1, 2, 3, 8, 16),
    scales: tuple[float, ...] = EXACT_SCALES,
) -> Problem:
    """Small integers and scales that are powers of two: every result of the laws is then exact in
    `dtype` in any order of summation, so that laws can ask for equality.

    In float32 the largest sum is below 3³ · 64 · 16 · 4 < 2¹⁷, in steps of 1/4, thus within 24
    bits. In float64 one factor of each product may carry multiples of 2⁻²⁶ beside its integers:
    45 bits, which float32 does not hold. In 16 bits elements are -1, 0 and 1, and laws/allowed.py
    looks whether the sums are within the 8 bits of bfloat16.
    """
    if np_dtype(dtype).itemsize == 2:
        features = tuple(n for n in features if n in _NARROW["features"])
        ranks = tuple(n for n in ranks if n in _NARROW["ranks"])
    m, k, d, r = _sizes(draw, tokens, features, ranks)
    rng = _rng(draw)
    carriers = draw(pick(_CARRIERS)) if dtype == "float64" else ()

    def make(name: str, *shape: int) -> Array:
        a = integer_array(rng, shape, dtype=dtype)
        return a + FINE * integer_array(rng, shape, dtype=dtype) if name in carriers else a

    return Problem(
        x=make("x", m, k),
        W=make("W", d, k),
        A=make("A", r, k),
        B=make("B", d, r),
        dy=make("dy", m, d),
        scale=draw(pick(scales)),
        bias=make("bias", d) if draw(_EITHER) else None,
        seed=draw(_SMALL_SEEDS),
    )


def assigned(pattern: str, m: int, n: int, rng: np.random.Generator) -> Array:
    """Which of n adapters each of m rows uses, int64, -1 for none. "returns": an adapter that comes
    back after another."""
    rows = np.full(m, -1)
    if n and pattern == "random":
        rows = rng.integers(-1, n, m)
    elif n and pattern == "runs":
        rows = np.sort(rng.integers(-1, n, m))
    elif n and pattern == "alternating":
        rows = np.arange(m) % (n + 1) - 1
    elif n and pattern == "returns":
        rows = np.where(np.arange(m) % 3 == 1, int(rng.integers(-1, n)), int(rng.integers(0, n)))
    elif n and pattern == "one":
        rows = np.full(m, int(rng.integers(0, n)))
    return rows.astype(np.int64)


@st.composite  # type: ignore[untyped-decorator]
def several_adapters(
    draw: Any,
    dtype: str = "float32",
    exact: bool = False,
    kinds: tuple[str, ...] = KINDS,
) -> Problem:
    """x, W, bias and 0 to 4 adapters of different rank and scale; `rows` [m] says which row uses
    which (-1: none): one for all, alternating, in runs, or at random."""
    m = draw(pick((1, 2, 3, 4, 6, 0, 9, 16)))
    k, d = draw(pick((1, 2, 5, 16, 33))), draw(pick((1, 2, 5, 16, 33)))
    n = draw(pick((1, 2, 3, 0, 4)))
    ranks = [draw(pick((1, 2, 3, 8, 16))) for _ in range(n)]
    scales = [draw(pick(EXACT_SCALES if exact else SCALES)) for _ in range(n)]
    pattern = draw(pick(("random", "runs", "alternating", "one", "none")))
    kind, rng = draw(pick(kinds)), _rng(draw)

    def make(*shape: int) -> Array:
        a = integer_array(rng, shape, 2, dtype) if exact else elements(rng, shape, kind, dtype)
        return a

    rows = assigned(pattern, m, n, rng)
    return Problem(
        x=make(m, k),
        W=make(d, k),
        bias=make(d) if draw(_EITHER) else None,
        adapters=[(make(r, k), make(d, r), s) for r, s in zip(ranks, scales)],
        rows=rows.astype(np.int64),
        seed=draw(_SMALL_SEEDS),
    )


@st.composite  # type: ignore[untyped-decorator]
def attention_problems(draw: Any, dtype: str = "float32") -> Problem:
    """A tiny attention: 1 to 4 heads that share 1 or more key heads, 1 to 3 sequences, adapters on
    any of its four projections."""
    kv = draw(pick((1, 2)))
    heads = kv * draw(pick((1, 2, 3)))
    D = draw(pick((2, 4, 6, 8, 10)))
    hidden = draw(pick((2, 3, 8)))
    lengths = tuple(draw(_LENGTHS))
    r = draw(pick((1, 2, 5)))
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    chosen = [n for n in names if draw(_EITHER)]
    theta, rng = draw(pick((10000.0, 100.0))), _rng(draw)
    out = {"q_proj": heads * D, "k_proj": kv * D, "v_proj": kv * D, "o_proj": hidden}
    inp = {"q_proj": hidden, "k_proj": hidden, "v_proj": hidden, "o_proj": heads * D}

    def make(rows: int, columns: int) -> Array:
        return (rng.normal(size=(rows, columns)) / np.sqrt(columns)).astype(np_dtype(dtype))

    m = sum(lengths)
    return Problem(
        x=rng.normal(size=(m, hidden)).astype(np_dtype(dtype)),
        dy=rng.normal(size=(m, hidden)).astype(np_dtype(dtype)),
        weights={n: make(out[n], inp[n]) for n in names},
        adapters={
            n: (make(r, inp[n]), make(out[n], r), draw(pick((1.0, 2.0, -0.5, 0.0)))) for n in chosen
        },
        shape=AttentionShape(heads, kv, D, lengths, theta),
        seed=draw(_SMALL_SEEDS),
    )


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_TARGETS = st.lists(st.sampled_from(MODULES), min_size=1, max_size=3, unique=True)


@st.composite  # type: ignore[untyped-decorator]
def plans(draw: Any) -> Problem:
    """A PEFT config and the modules of a small transformer: several layers, shapes that differ,
    targets, patterns of rank and alpha, rsLoRA. A pattern may match no target."""
    layers = draw(st.integers(1, 3))
    shapes = {n: (draw(_FEW), draw(_FEW)) for n in MODULES}
    modules = {
        f"model.layers.{i}.{'self_attn' if n[1:] == '_proj' else 'mlp'}.{n}": shapes[n]
        for i in range(layers)
        for n in MODULES
    }
    targets = draw(_TARGETS)
    r, alpha = draw(pick((1, 2, 4, 9))), draw(pick((1, 16, 8, 3, 2.5)))
    config: dict[str, Any] = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": targets,
        "use_rslora": draw(_EITHER),
    }
    special = draw(pick(tuple(targets)))
    layer = draw(st.integers(0, layers - 1))
    keys = [special, f"layers.{layer}.*{special}"]
    if draw(_EITHER):
        config["rank_pattern"] = {draw(pick(tuple(keys))): draw(pick((3, 5)))}
    if draw(_EITHER):
        config["alpha_pattern"] = {draw(pick(tuple(keys))): draw(pick((2, 7)))}
    return Problem(config=config, modules=modules, seed=draw(_SMALL_SEEDS))
