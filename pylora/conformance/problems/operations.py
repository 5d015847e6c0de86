"""Hypothesis strategies for single operations: norms, gates, rotations, loss and optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.problems.adapted import ALL_DTYPES, sizes
from pylora.conformance.problems.layers import SEEDS, elements, np_dtype, pick, st
from pylora.conformance.testcase import Problem
from pylora.types import AdamW

DTYPES = ALL_DTYPES
_KINDS = ("normal", "integers", "zeros", "positive", "tiny", "wide")


def _rng(draw: Any) -> np.random.Generator:
    return np.random.default_rng(draw(SEEDS))


@st.composite  # type: ignore[untyped-decorator]
def norms(draw: Any, dtype: str = "float32") -> Problem:
    """x [m,n], w [n] and eps, which counts where x is small; rows of zeros."""
    m, n = draw(pick((1, 2, 5, 0))), draw(pick((1, 2, 3, 8, 17, 64)))
    rng, kind = _rng(draw), draw(pick(_KINDS))
    return Problem(
        x=elements(rng, (m, n), kind, dtype),
        w=elements(rng, (n,), draw(pick(("normal", "positive", "zeros"))), dtype),
        eps=draw(pick((1e-6, 1e-5, 1e-2))),
    )


def norm_of(size: int, dtype: str) -> Problem:
    rng = np.random.default_rng(size)
    x, w = (elements(rng, shape, "normal", dtype) for shape in ((2, size), (size,)))
    return Problem(x=x, w=w, eps=1e-5, size=size, resized=lambda n: norm_of(max(1, n), dtype))


def beyond_norms(dtype: str, examples: int) -> Iterator[Problem]:
    """Rows past every limit."""
    for size in sizes(65536, examples):
        yield norm_of(size, dtype)


@st.composite  # type: ignore[untyped-decorator]
def gates(draw: Any, dtype: str = "float32") -> Problem:
    """gate, up and dy [m,n]; gates also large, where exp overflows, and near -1.28."""
    shape = draw(pick((1, 2, 5, 0))), draw(pick((1, 3, 8, 33)))
    rng, size = _rng(draw), draw(pick((1.0, 3.0, 30.0, 200.0)))
    gate = (elements(rng, shape, "normal", "float64") * size).astype(np_dtype(dtype))
    if draw(st.booleans()):
        gate = np.full(shape, -1.2784645, np_dtype(dtype))
    up, dy = (elements(rng, shape, draw(pick(("normal", "zeros"))), dtype) for _ in range(2))
    return Problem(gate=gate, up=up, dy=dy)


@st.composite  # type: ignore[untyped-decorator]
def rotations(draw: Any, dtype: str = "float32") -> Problem:
    """x [m, heads * D], any positions (not ascending, beyond 8, 12 and 16 bits), theta, layout."""
    m, heads, D = draw(pick((1, 2, 5))), draw(pick((1, 2, 3))), draw(pick((2, 4, 6, 64)))
    rng = _rng(draw)
    edges = [0, 1, 2, 127, 255, 256, 257, 511, 2047, 2049, 4097, 32769, 65535, 65537]
    return Problem(
        x=elements(rng, (m, heads * D), "normal", dtype),
        position=rng.choice(edges, m).astype(np.int64),
        head_dim=D,
        theta=draw(pick((10000.0, 100.0, 1e6))),
        layout=draw(pick(("half", "interleaved"))),
        inverse=draw(st.booleans()),
    )


@st.composite  # type: ignore[untyped-decorator]
def losses(draw: Any, dtype: str = "float32") -> Problem:
    """logits [m,n] and labels [m], some of them -100: none, one, all; large and equal logits."""
    m, n = draw(pick((1, 2, 5, 9))), draw(pick((1, 2, 3, 33)))
    rng, size = _rng(draw), draw(pick((1.0, 0.0, 10.0, 1e4)))
    logits = (rng.normal(size=(m, n)) * size).astype(np_dtype(dtype))
    if draw(st.booleans()):
        logits = logits + np_dtype(dtype)(1000.0) if dtype == "bfloat16" else logits + 1000
        logits = logits.astype(np_dtype(dtype))
    labels = rng.integers(0, n, m)
    share = draw(pick((0.0, 0.5, 1.0)))
    labels[rng.random(m) < share] = -100
    return Problem(logits=logits, labels=labels.astype(np.int64))


def loss_of(size: int, dtype: str) -> Problem:
    rng = np.random.default_rng(size)
    logits = rng.normal(size=(2, size)).astype(np_dtype(dtype))
    labels = np.array([size - 1, 0])
    resized = lambda n: loss_of(max(1, n), dtype)
    return Problem(logits=logits, labels=labels, size=size, resized=resized)


def beyond_losses(dtype: str, examples: int) -> Iterator[Problem]:
    """Vocabularies past every limit."""
    for size in sizes(65536, examples):
        yield loss_of(size, dtype)


@st.composite  # type: ignore[untyped-decorator]
def steps(draw: Any, dtype: str = "float32") -> Problem:
    """p, g, m, v of one shape and settings; the first step and late ones, no gradient, no decay."""
    shape = draw(pick(((1,), (3,), (2, 5), (8, 1), (33,))))
    rng, kind = _rng(draw), draw(pick(("normal", "zeros", "integers")))
    first = draw(st.booleans())
    m = elements(rng, shape, "zeros", dtype) * np_dtype(dtype).type(0.1)
    v = np.abs(elements(rng, shape, "zeros", dtype)) * np_dtype(dtype).type(0.01)
    return Problem(
        p=elements(rng, shape, "normal", dtype),
        g=elements(rng, shape, kind, dtype),
        m=np.zeros_like(m) if first else m,
        v=np.zeros_like(v) if first else v,
        settings=AdamW(
            lr=draw(pick((1e-3, 0.1, 0.0))),
            step=1 if first else draw(pick((2, 10, 1000, 100_000))),
            beta1=draw(pick((0.9, 0.0, 0.5))),
            beta2=draw(pick((0.999, 0.9))),
            eps=draw(pick((1e-8, 1e-3))),
            weight_decay=draw(pick((0.0, 0.1, 0.01))),
        ),
    )


@st.composite  # type: ignore[untyped-decorator]
def several_gradients(draw: Any, dtype: str = "float32") -> Problem:
    """1 to 4 gradients of different shape and size, and a limit below, at and above their norm."""
    n, rng = draw(pick((2, 1, 3, 4))), _rng(draw)
    shapes = [((3,), (2, 5), (1,), (4, 1))[i] for i in range(n)]
    sizes_of = [10.0 ** draw(pick((0, -2, 2))) for _ in range(n)]
    grads = [(rng.normal(size=s) * z).astype(np_dtype(dtype)) for s, z in zip(shapes, sizes_of)]
    if draw(pick((False, False, False, True))):
        grads = [np.zeros_like(g) for g in grads]
    norm = float(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads)))
    limit = draw(pick((0.1, 0.5, 1.5, 10.0))) * (norm or 1.0)
    return Problem(grads=grads, limit=limit)


@st.composite  # type: ignore[untyped-decorator]
def adapter_steps(draw: Any, dtype: str = "float32") -> Problem:
    """A [r,k], B [d,r] and a bias of B, their gradients, rates and decay."""
    r, k, d = (draw(pick(n)) for n in ((1, 2, 4), (1, 3, 8), (1, 3, 8)))
    rng, with_bias = _rng(draw), draw(st.booleans())
    shapes: dict[str, tuple[int, ...]] = {"A": (r, k), "B": (d, r)}
    shapes |= {"bias": (d,)} if with_bias else {}
    return Problem(
        params={n: elements(rng, s, "normal", dtype) for n, s in shapes.items()},
        grads={n: elements(rng, s, "normal", dtype) for n, s in shapes.items()},
        lr=draw(pick((1e-3, 0.1))),
        weight_decay=draw(pick((0.1, 0.0, 0.5))),
        ratio=draw(pick((1.0, 16.0, 2.0))),
    )
