"""The law of the shape of initial values: a cheap stand-in for the normal distribution, which no
count of a few ten thousand elements shows, is seen in half a million.

The elements of many seeds are dealt out to cells whose shares are known. What is looked at is the
sum of a weight of each element's cell, for weights that a distribution of another shape moves:
Hermite's polynomials (mean, variance, skewness, kurtosis, ...) where it should be normal, cosines
where it should be uniform. bounds/chance.py says how often such a sum deceives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from pylora.conformance.bounds import chance
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.numbers import quantile
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

R, K = 64, 1024  # of each matrix
SEEDS = 8  # so many matrices together
PARTS = 256  # cells of equal share; the outermost are cut again and again in half
TAIL = 16  # down to 2^-TAIL
MODES = 8
SOURCES = ("init", "initial", "embedding_init")


@cache
def ends() -> Array:
    """Where the cells end, as u in 0 .. 1, ascending; the first and last cells end at 0 and 1."""
    inner = np.arange(1, PARTS) / PARTS
    tail = 2.0 ** -np.arange(int(math.log2(PARTS)) + 1, TAIL + 1)
    return np.sort(np.concatenate([inner, tail, 1 - tail]))


@cache
def shares() -> Array:
    return np.diff(np.concatenate([[0.0], ends(), [1.0]]))


@cache
def _quantiles() -> Array:
    return np.array([quantile(float(u)) for u in ends()])


@cache
def weights(kind: str) -> Array:
    """[modes, cells]: what each cell weighs, at the middle of its share."""
    edges = np.concatenate([[0.0], ends(), [1.0]])
    middle = (edges[1:] + edges[:-1]) / 2
    if kind == "uniform":
        return np.array([np.cos(math.pi * j * middle) for j in range(1, MODES + 1)])
    z = np.array([quantile(float(u)) for u in middle])
    he = [np.ones_like(z), z]
    for j in range(1, MODES):
        he.append(z * he[j] - j * he[j - 1])
    return np.array([h / math.sqrt(math.factorial(j)) for j, h in enumerate(he)][1:])


def _made(t: Trial, p: Problem, seed: int) -> tuple[Array, float]:
    """The matrix, and the standard deviation or the edge that it should have."""
    if p.source == "embedding_init":
        return t.embedding_init(3, K, R, seed, False)[1], 1.0
    if p.source == "initial":
        A = t.initial("linear", "model.q_proj", 3, K, R, seed, p.method, False)[0]
    else:
        A = t.init(3, K, R, seed, p.method)[0]
    return A, 1 / math.sqrt(K) if p.method == "kaiming" else 1 / R


def _shape(t: Trial, p: Problem) -> None:
    # All are looked up, not the one: mutants/hunt.py learns from it what the law has a use for.
    there = [s for s in SOURCES if callable(getattr(t.implementation, s, None))]
    if p.source not in there:
        raise NotTested(f"there is no {p.source}")
    kind = "uniform" if p.method == "kaiming" and p.source != "embedding_init" else "normal"
    counts = np.zeros(len(shares()), np.int64)
    for i in range(SEEDS):
        a, width = _made(t, p, p.seed + i)
        a = np.asarray(a)
        if a.dtype.itemsize < 4:
            raise NotTested("initial values are kept in 16 bits")
        edges = (2 * ends() - 1 if kind == "uniform" else _quantiles()) * width
        at = np.searchsorted(edges, a.astype(np.float64).reshape(-1), side="right")
        counts += np.bincount(at, minlength=len(counts))
    level = chance.limit(MODES)
    for j, w in enumerate(weights(kind)):
        nats = chance.weighted(counts, w, shares())
        if nats >= level:
            mean, fair = float(counts @ w) / counts.sum(), float(shares() @ w)
            what = f"Hermite's polynomial {j + 1}" if kind == "normal" else f"cos {j + 1} π u"
            said = f"the mean of {what} of {counts.sum()} elements from {p.source}, {kind}, is"
            t.fail(f"{said} {mean:.5f}, expected {fair:.5f}; a chance below e^-{nats:.0f}")


def _sources(dtype: str, examples: int) -> Iterator[Problem]:
    for i, source in enumerate(SOURCES):
        yield Problem(source=source, method="gaussian", seed=100 * i)


def _any() -> Any:
    return st.builds(
        lambda source, method, seed: Problem(source=source, method=method, seed=seed),
        pick(SOURCES),
        pick(("gaussian", "kaiming")),
        st.integers(0, 2**31 - 100),
    )


def power(moved: Callable[[Array], Array]) -> float:
    """The chance to see that a normal distribution's cells have `moved(z)` times their shares."""
    w = weights("normal")
    other = shares() * moved(w[0])
    other = other / other.sum()
    n = SEEDS * R * K
    level = chance.limit(MODES)
    return max(chance.weighted_power(n, one, shares(), other, level) for one in w)


LAWS = (
    Law(
        "I22",
        "Initial values have the distribution's shape, not a likeness of it.",
        "Σ over 524,288 elements of Hermite's polynomials 1 to 8 of z, or of cos jπu, "
        "each within its bound (Chernoff; together 10⁻¹⁵): an excess kurtosis of 0.1 is seen",
        "a sum of twelve uniform numbers, a table or a logistic curve stands for the normal one",
        ("I-3", "I-5", "I-2"),
        ("forward",),
        _any,
        _shape,
        (),
        covering=_sources,
        cost=100,
    ),
)
