"""Task arithmetic on arrays, each function against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters import arithmetic

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6))


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(SHAPES, st.floats(0.01, 1), st.integers(0, 99))
def test_pruning_keeps_the_largest(shape: tuple[int, int], density: float, seed: int) -> None:
    x = drawn(shape, seed)
    left = arithmetic.prune_small(x, density)
    kept = left != 0
    assert kept.sum() == int(density * x.size)
    np.testing.assert_array_equal(left[kept], x[kept])
    if kept.any() and not kept.all():
        assert np.abs(x[kept]).min() >= np.abs(x[~kept]).max()


def test_of_equals_the_first_are_kept() -> None:
    x = np.array([1.0, -1.0, 1.0, -1.0], np.float32)
    np.testing.assert_array_equal(arithmetic.prune_small(x, 0.5), [1, -1, 0, 0])


def test_dropping_keeps_the_mean_and_the_share() -> None:
    x = np.ones((200, 200), np.float32)
    left = arithmetic.drop_random(x, 0.3, seed=1, stream=2)
    assert set(np.unique(left)) == {0.0, 1 / 0.3}
    # Six standard deviations of a binomial share; the seed is fixed.
    assert abs((left != 0).mean() - 0.3) < 6 * np.sqrt(0.3 * 0.7 / x.size)
    assert (left != arithmetic.drop_random(x, 0.3, seed=1, stream=3)).any()


@given(SHAPES, st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_election_is_what_the_paper_says(
    shape: tuple[int, int], n: int, by_count: bool, seed: int
) -> None:
    tensors = [np.round(drawn(shape, seed + i)) for i in range(n)]  # zeros and cancellations
    weights = list(drawn((n,), seed + 77).astype(float))
    got = arithmetic.elected(tensors, weights, by_count=by_count)
    for at in np.ndindex(shape):
        values = [float(t[at]) for t in tensors]
        votes = [np.sign(v) if by_count else v for v in values]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [(v, w) for v, w in zip(values, weights, strict=True) if np.sign(v) == sign]
        want = sum(v * w for v, w in agree) / max(len(agree), 1)
        assert got[at] == pytest.approx(want, rel=1e-12, abs=1e-12)


@given(
    st.integers(1, 7), st.integers(1, 8), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)
)
def test_truncation_is_the_nearest_of_its_rank(
    r: int, d: int, k: int, rank: int, seed: int
) -> None:
    A, B = drawn((r, k), seed), drawn((d, r), seed + 1)
    whole = B.astype(float) @ A
    singular = np.linalg.svd(whole, compute_uv=False)
    eps = 64 * np.finfo(float).eps * float(singular[0])
    for A1, B1, lost, norm in (
        arithmetic.truncated(A, B, rank),
        arithmetic.factored(whole, rank),
    ):
        assert A1.shape == (rank, k) and B1.shape == (d, rank)
        assert abs(np.linalg.norm(whole - B1 @ A1) - np.linalg.norm(singular[rank:])) <= eps
        assert abs(lost - np.linalg.norm(singular[rank:])) <= eps
        assert abs(norm - np.linalg.norm(whole)) <= eps
