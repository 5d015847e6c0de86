"""Choosing a token: the probabilities, what each setting keeps, and transformers' meaning of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pylora.errors import ConfigError, PyloraError
from pylora.generation.sampling import Sampling, penalized, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.1, 0.25, 0.15]))  # ranked: 1, 3, 4, 0, 2


def share(**settings: Any) -> list[float]:
    """How often each token is drawn for u at the middles of 1000 equal parts."""
    drawn = [sample(LOGITS, (i + 0.5) / 1000, 1.0, **settings) for i in range(1000)]
    return [n / 1000 for n in np.bincount(drawn, minlength=5)]


def test_sampling_follows_the_probabilities() -> None:
    assert share() == pytest.approx([0.1, 0.4, 0.1, 0.25, 0.15], abs=1e-3)
    assert sample(LOGITS, 0.399, 1.0) == 1 and sample(LOGITS, 0.401, 1.0) == 3
    assert sample(LOGITS, 1 - 2**-53, 1.0) == 2
    hot = [sample(LOGITS, (i + 0.5) / 1000, 2.0) for i in range(1000)]
    want = np.sqrt([0.1, 0.4, 0.1, 0.25, 0.15])
    assert np.bincount(hot) / 1000 == pytest.approx(want / want.sum(), abs=1e-3)


def test_top_k_keeps_the_likeliest_and_ties_go_to_the_lower_id() -> None:
    assert share(top_k=1) == [0, 1, 0, 0, 0]
    assert share(top_k=2) == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], abs=1e-3)
    assert share(top_k=4)[2] == 0 < share(top_k=4)[0]
    assert share(top_k=99) == share()


def test_top_p_keeps_the_shortest_run_that_reaches_it() -> None:
    assert share(top_p=1e-9) == share(top_p=0.39) == [0, 1, 0, 0, 0]
    assert share(top_p=0.41) == share(top_p=0.64) == share(top_k=2)
    assert share(top_p=0.66) == share(top_k=3)
    # Of what top_k left: 0.4 of 0.65 is 0.615.
    assert share(top_k=2, top_p=0.6) == share(top_k=1)
    assert share(top_k=2, top_p=0.62) == share(top_k=2)


def test_min_p_keeps_those_near_the_likeliest() -> None:
    assert share(min_p=0.0) == share()
    assert share(min_p=1.0) == share(top_k=1)
    assert share(min_p=0.6) == share(top_k=2)  # 0.25 of 0.4 is 0.625
    assert share(min_p=0.63) == share(top_k=1)
    assert share(min_p=0.3) == share(top_k=3)
    assert share(min_p=0.01, top_k=2) == share(top_k=2)
    assert share(min_p=0.3, top_p=0.41) == share(top_p=0.41)


def test_equals_at_the_edge_of_min_p_all_stay() -> None:
    logits = np.array([1.0, 3.0, 1.0, 3.0, 1.0])
    drawn = {sample(logits, (i + 0.5) / 100, 1.0, min_p=1.0) for i in range(100)}
    assert drawn == {1, 3}


def test_a_penalty_makes_what_was_said_less_likely() -> None:
    logits = np.array([2.0, -2.0, 0.0, 4.0], np.float32)
    assert penalized(logits, [0, 1, 1, 2], 2.0).tolist() == [1.0, -4.0, 0.0, 4.0]
    assert logits.tolist() == [2.0, -2.0, 0.0, 4.0], "the logits themselves are not written to"
    how = Sampling(repetition_penalty=10.0)
    assert how.choose(logits, 0.5) == 3 and how.choose(logits, 0.5, {3}) == 0
    assert how.choose(np.array([-2.0, -1.0]), 0.5, {1}) == 0


@pytest.mark.parity
def test_the_settings_mean_what_they_mean_in_transformers(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    for trial in range(20):
        logits = (3 * rng.standard_normal(60)).astype(np.float32)
        seen = rng.integers(0, 60, 8)
        T, top_k, top_p, min_p = 0.7, 25, 0.9, (0.0, 0.02, 0.2)[trial % 3]
        scores, ids = torch.tensor(logits)[None], torch.tensor(seen)[None]
        for step in (
            process.RepetitionPenaltyLogitsProcessor(1.3),
            process.TemperatureLogitsWarper(T),
            process.TopKLogitsWarper(top_k),
            process.TopPLogitsWarper(top_p),
            process.MinPLogitsWarper(min_p),
        ):
            scores = step(ids, scores)
        want = torch.softmax(scores[0], 0).numpy()
        how = Sampling(T, top_k, top_p, min_p, 1.3)
        drawn = [how.choose(logits, (i + 0.5) / 4000, seen.tolist()) for i in range(4000)]
        assert np.bincount(drawn, minlength=60) / 4000 == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_k": -1},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": [0.5]},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"repetition_penalty": float("nan")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": 1001},
        {"logit_bias": 3},
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^{name} must be "):
        Sampling(**settings)


def spelled_out(
    logits: np.ndarray, u: float, T: float, top_k: int, top_p: float, min_p: float = 0.0
) -> int:
    """The rule of `sample`, all tokens ranked and summed."""
    scores = logits.astype(np.float64)
    ranked = sorted(range(scores.size), key=lambda i: (-scores[i], i))
    ranked = ranked[:top_k] if top_k else ranked
    p = np.exp((scores[ranked] - scores.max()) / T)
    if top_p < 1:
        ranked = ranked[: int(np.argmax(np.cumsum(p) >= top_p * p.sum())) + 1]
    ranked = [i for i, likely in zip(ranked, p) if likely >= min_p * p[0]]
    return ranked[int(np.argmax(np.cumsum(p[: len(ranked)]) > u * p[: len(ranked)].sum()))]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 12.0])
def test_ranking_only_the_likely_tokens_changes_nothing(
    rng: np.random.Generator, spread: float
) -> None:
    logits = (spread * rng.standard_normal(3000)).astype(np.float32)
    logits[::7] = logits[0]  # equals
    for top_k in (0, 1, 40, 2999, 3000, 5000):
        for top_p in (1.0, 0.3, 0.9, 0.99999):
            for T in (0.3, 1.0, 5.0):
                for u in (1e-6, 0.2, 0.77, 0.9999999):
                    for min_p in (0.0, 1e-7, 0.05, 1.0):
                        want = spelled_out(logits, u, T, top_k, top_p, min_p)
                        got = sample(logits, u, T, top_k, top_p, min_p)
                        assert got == want, (top_k, top_p, min_p, T, u)


def test_large_logits_are_finite() -> None:
    logits = np.full(5, -3e38, np.float32)  # their sum is not
    logits[3] = 3e38
    assert sample(logits, 0.5, 1.0) == 3
    with pytest.raises(PyloraError, match="not finite"):
        sample(np.array([1, np.inf, 2], np.float32), 0.5, 1.0)
