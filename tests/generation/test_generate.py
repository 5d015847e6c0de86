"""Generation: what it takes, what it draws, and that nothing depends on the rest of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pylora.errors import ConfigError, DataError, PyloraError
from pylora.generation.generate import generate, stream
from pylora.generation.sampling import Sampling, penalized
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


# ---- what cannot be done ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"prompts": [[1], []]}, DataError, "prompt 1 is empty"),
        ({"prompts": [1, 2]}, DataError, r"one prompt goes into a list too: \[ids\]"),
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


# ---- as it comes ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_streaming_is_generating(ops: Any, temperature: float) -> None:
    net = a_model(ops)
    how = Sampling(temperature)
    out: dict[int, list[int]] = {i: [] for i in range(len(PROMPTS))}
    ended = []
    for row, token in stream(net, PROMPTS, 9, sampling=how, eos_ids=(7, 20), batch_size=2):
        assert row not in ended
        if token is None:
            ended.append(row)
        else:
            out[row].append(token)
    whole = generate(net, PROMPTS, 9, temperature=temperature, eos_ids=(7, 20))
    assert list(out.values()) == whole
    assert sorted(ended) == list(range(len(PROMPTS))), "each row's end is told once"


def test_a_mistake_is_raised_before_the_first_token() -> None:
    net = a_model("numpy")
    with pytest.raises(DataError, match="prompt 0 is empty"):
        stream(net, [[]], 3)  # not even asked for a token


def test_stop_ends_a_row_and_no_other(ops: Any) -> None:
    net = a_model(ops)
    whole = generate(net, PROMPTS, 12, eos_ids=())
    asked: list[tuple[int, int]] = []

    def stop(row: int, token: int) -> bool:
        asked.append((row, token))
        return row == 1 and token == whole[1][4]

    got = generate(net, PROMPTS, 12, eos_ids=(), stop=stop, batch_size=2)
    cut = whole[1].index(whole[1][4]) + 1
    assert got == [w if i != 1 else w[:cut] for i, w in enumerate(whole)]
    assert [t for row, t in asked if row == 1] == whole[1][:cut]


def test_a_penalty_counts_the_prompt_and_the_answer(ops: Any) -> None:
    net = a_model(ops)
    prompt = list(PROMPTS[2])
    text = list(prompt)
    for _ in range(8):
        logits = np.array(ops.to_numpy(net.forward(text)[0])[-1])
        text.append(int(np.argmax(penalized(logits, text, 1.8))))
    got = generate(net, [prompt], 8, eos_ids=(), repetition_penalty=1.8)
    assert got == [text[len(prompt) :]]
    assert got != generate(net, [prompt], 8, eos_ids=())
    others = [*PROMPTS[:2], prompt]
    assert generate(net, others, 8, eos_ids=(), repetition_penalty=1.8)[2:] == got
