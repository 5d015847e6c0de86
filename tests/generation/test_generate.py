"""Generation: what it takes, what it draws, and that nothing depends on the rest of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pylora.errors import ConfigError, DataError, PyloraError, WrongTypeError
from pylora.generation.generate import generate, sample
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.types import LoRA

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [11, 12], [3, 3, 3, 3]]


def a_model(ops: Any, **over: Any) -> Llama:
    return Llama.random(LlamaConfig.tiny(**over), seed=5, backend=ops)


def an_adapter(config: LlamaConfig, rng: np.random.Generator, b: float) -> dict[str, LoRA]:
    return {
        path: LoRA(
            rng.standard_normal((2, spec.k)).astype(np.float32),
            (b * rng.standard_normal((spec.d, 2))).astype(np.float32),
            1.0,
        )
        for path, spec in config.modules().items()
    }


def test_greedy_takes_the_likeliest_token_of_a_full_forward(ops: Any) -> None:
    net = a_model(ops, sliding_window=4, model_type="mistral")
    for prompt, got in zip(PROMPTS, generate(net, PROMPTS, 7, eos_ids=())):
        text = list(prompt)
        for _ in range(7):
            text.append(int(np.argmax(ops.to_numpy(net.forward(text)[0])[-1])))
        assert got == text[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_row_does_not_depend_on_its_batch(ops: Any, temperature: float) -> None:
    net = a_model(ops)
    settings: dict[str, Any] = {"temperature": temperature, "seed": 9, "eos_ids": (7, 20, 33)}
    whole = generate(net, PROMPTS, 12, **settings)
    assert len({len(row) for row in whole}) > 1, "some rows should finish early"
    for size in (1, 2, 3):
        assert generate(net, PROMPTS, 12, batch_size=size, **settings) == whole
    for i, prompt in enumerate(PROMPTS):
        assert generate(net, [prompt], 12, first_row=i, **settings) == [whole[i]]
    swapped = [*PROMPTS[:-1], [60] * 9]
    assert generate(net, swapped, 12, **settings)[:-1] == whole[:-1]


def test_prompts_longer_than_one_step_takes_are_all_served(
    ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = a_model(ops)
    whole = generate(net, PROMPTS, 5)
    monkeypatch.setattr("pylora.generation.generate._PREFILL_TOKENS", 2)
    assert generate(net, PROMPTS, 5) == whole


def test_the_seed_decides_what_is_drawn(ops: Any) -> None:
    net = a_model(ops)
    runs = [generate(net, PROMPTS, 8, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    same = generate(net, [[1], [1]], 8, temperature=1.0)
    assert same[0] != same[1], "equal prompts in different rows draw from different streams"


def test_zero_b_generates_what_the_base_does(ops: Any, rng: np.random.Generator) -> None:
    net = a_model(ops)
    for temperature in (0.0, 1.0):
        net.detach()
        base = generate(net, PROMPTS, 6, temperature=temperature)
        net.attach(an_adapter(net.config, rng, 0.0))
        assert generate(net, PROMPTS, 6, temperature=temperature) == base
        net.attach(an_adapter(net.config, rng, 1.0))
        assert generate(net, PROMPTS, 6, temperature=temperature) != base


def test_the_end_token_stops_a_row_and_is_not_given(ops: Any) -> None:
    net = a_model(ops)
    free = generate(net, PROMPTS, 6)
    ends = {free[0][2], free[2][0]}
    heard: list[tuple[int, int]] = []
    got = generate(net, PROMPTS, 6, eos_ids=ends, on_token=lambda i, t: heard.append((i, t)))
    for full, row in zip(free, got):
        stop = next((j for j, token in enumerate(full) if token in ends), len(full))
        assert row == full[:stop]
    assert len(got[2]) == 0 and len(got[0]) <= 2
    for i, row in enumerate(got):
        assert [t for j, t in heard if j == i] == row
    own = Llama.random(LlamaConfig.tiny(eos_token_ids=tuple(ends)), seed=5, backend=ops)
    assert generate(own, PROMPTS, 6) == got


def test_no_prompts_and_no_tokens(ops: Any) -> None:
    net = a_model(ops)
    assert generate(net, [], 5) == []
    assert generate(net, PROMPTS, 0) == [[] for _ in PROMPTS]


# ---- sampling ---------------------------------------------------------------------------------

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


# ---- what cannot be done ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"prompts": [[1], []]}, DataError, "prompt 1 is empty"),
        ({"prompts": [1, 2]}, WrongTypeError, r"one prompt goes into a list too: \[ids\]"),
        ({"prompts": [[1] * 128]}, ConfigError, r"prompt 0 has 128.*max_position.*\(128\)"),
        ({"prompts": [[61]]}, DataError, "outside the vocabulary"),
        ({"max_new_tokens": -1}, ConfigError, "max_new_tokens"),
        ({"max_new_tokens": 128}, ConfigError, "with 128 new ones"),
        ({"temperature": -0.5}, ConfigError, "temperature"),
        ({"temperature": float("nan")}, ConfigError, "temperature"),
        ({"top_p": 0.0}, ConfigError, "top_p"),
        ({"top_p": 1.5}, ConfigError, "top_p"),
        ({"top_k": -1}, ConfigError, "top_k"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], error: type[Exception], says: str) -> None:
    net = a_model("numpy")
    arguments: dict[str, Any] = {"prompts": [[1]], "max_new_tokens": 3, **settings}
    with pytest.raises(error, match=says):
        generate(net, **arguments)


def test_broken_weights_are_reported_not_sampled(rng: np.random.Generator) -> None:
    net = a_model("numpy")
    adapter = an_adapter(net.config, rng, 1.0)
    adapter["lm_head"].B[3] = np.nan
    net.attach(adapter)
    for temperature in (0.0, 1.0):
        with pytest.raises(PyloraError, match="not finite"):
            generate(net, [[1]], 2, temperature=temperature)


def spelled_out(logits: np.ndarray, u: float, T: float, top_k: int, top_p: float) -> int:
    """The rule of `sample`, all tokens ranked and summed."""
    scores = logits.astype(np.float64)
    ranked = sorted(range(scores.size), key=lambda i: (-scores[i], i))
    ranked = ranked[:top_k] if top_k else ranked
    p = np.exp((scores[ranked] - scores.max()) / T)
    if top_p < 1:
        ranked = ranked[: int(np.argmax(np.cumsum(p) >= top_p * p.sum())) + 1]
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
                    want = spelled_out(logits, u, T, top_k, top_p)
                    assert sample(logits, u, T, top_k, top_p) == want, (top_k, top_p, T, u)


def test_large_logits_are_finite() -> None:
    logits = np.full(5, -3e38, np.float32)  # their sum is not
    logits[3] = 3e38
    assert sample(logits, 0.5, 1.0) == 3
    with pytest.raises(PyloraError, match="not finite"):
        sample(np.array([1, np.inf, 2], np.float32), 0.5, 1.0)
