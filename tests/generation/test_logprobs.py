"""Log probabilities and the largest scores, against float64 and a whole sort."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pylora.generation.logprobs import Logprobs, largest


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
