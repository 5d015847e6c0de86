"""Log probabilities and the largest scores, against float64 and a whole sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pylora.generation.logprobs import Logprobs, largest, logprobs


def test_they_are_those_of_a_softmax(rng: np.random.Generator) -> None:
    for size in (1, 61, 5000):
        logits = (4 * rng.standard_normal(size)).astype(np.float32)
        exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        found = Logprobs(logits)
        got = [found.of(i) for i in range(size)]
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-6)
        top = found.top(5)
        assert [i for i, _ in top] == np.argsort(-logits, kind="stable")[:5].tolist()
        assert [p for _, p in top] == [found.of(i) for i, _ in top]
    assert Logprobs(np.array([0.0], np.float32)).of(0) == 0 and found.top(0) == ()


@given(st.integers(0, 700), st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_the_largest_and_of_equals_the_first(n: int, k: int, kinds: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, kinds, n).astype(np.float32)
    assert largest(scores, k).tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


def test_a_batch_has_what_each_row_has_alone(rng: np.random.Generator) -> None:
    rows = (4 * rng.standard_normal((6, 3000))).astype(np.float32)
    rows[:, ::3] = rows[:, :1]
    counts = [None, 0, 1, 20, 7, 3000]
    for dtype in (np.float32, np.float64):  # by the C core, and by NumPy
        found = logprobs(rows.astype(dtype), counts)
        assert found[0] is None
        for row, k, one in zip(rows[1:], counts[1:], found[1:]):
            assert one is not None and k is not None
            (alone,) = logprobs(row[None].astype(dtype), [k])
            exact = Logprobs(row.astype(np.float64))
            assert alone is not None and alone.top(k) == one.top(k) and alone.of(3) == one.of(3)
            assert [i for i, _ in one.top(k)] == [i for i, _ in exact.top(k)]
            assert abs(one.of(17) - exact.of(17)) < 1e-6
            assert one.top(k + 1)[:k] == one.top(k)
