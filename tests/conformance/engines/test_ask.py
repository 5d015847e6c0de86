"""The forms in which engines give log-probabilities, and those that cannot be read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pylora.conformance.engines.ask import WAYS, Got, Names, Prompt, Unreadable

NAMES = Names(["a", "b", "c", "�", "�"])
PROMPT = Prompt("abc", (0, 1, 2))
BY_NAME = {way.name: way for way in WAYS}


def read(way: str, answer: Any) -> Got:
    return BY_NAME[way].read(answer, PROMPT, NAMES)


def choice(logprobs: Any, **more: Any) -> Any:
    return {"choices": [{"logprobs": logprobs, **more}]}


ECHO = {
    "tokens": ["a", "b", "c", "a"],
    "token_logprobs": [None, -1.0, -2.0, -3.0],
    "top_logprobs": [None, {"b": -1.0}, {"c": -2.0}, {"a": -3.0, "�": -4.0, "b": -5}],
}


def test_openais_echo() -> None:
    got = read("echo, ids", choice(ECHO))
    assert got == Got({1: -1.0, 2: -2.0}, {0: -3.0, 1: -5.0})  # two tokens have the name of one


def test_echo_of_engines_that_stop_at_the_prompt() -> None:
    cut = {key: value[:3] for key, value in ECHO.items()}
    assert read("echo, text", choice(cut)) == Got({1: -1.0, 2: -2.0}, {})


@pytest.mark.parametrize("tokens", [["<s>", "a", "b", "c", "a"], ["b", "a", "c", "a"], ["a", "b"]])
def test_a_prompt_that_is_cut_otherwise_is_not_compared(tokens: list[str]) -> None:
    values = [None, *[-1.0] * (len(tokens) - 1)]
    with pytest.raises(Unreadable, match="other tokens"):
        read("echo, text", choice({"tokens": tokens, "token_logprobs": values}))


def test_vllms_prompt_logprobs() -> None:
    listed = [None, {"1": {"logprob": -1.5}, "0": {"logprob": -9}}, {"2": {"logprob": -2.5}}]
    answer = choice({"top_logprobs": [{"token_id:2": -0.5}]}, prompt_logprobs=listed)
    assert read("prompt_logprobs, ids", answer) == Got({1: -1.5, 2: -2.5}, {2: -0.5})


def test_llama_servers_n_probs() -> None:
    top = [{"id": 2, "token": "c", "logprob": -0.25}, {"id": 4, "token": "�", "logprob": -3}]
    answer = {"completion_probabilities": [{"top_logprobs": top}]}
    assert read("n_probs, ids", answer).next == {2: -0.25, 4: -3.0}


def test_the_new_form_of_completions() -> None:
    top = [{"token": "b", "logprob": -0.5}, {"id": 3, "token": "�", "logprob": -7}]
    content = {"content": [{"token": "b", "logprob": -0.5, "top_logprobs": top}]}
    assert read("top_logprobs, ids", choice(content)).next == {1: -0.5, 3: -7.0}
    alone = {"content": [{"token": "b", "logprob": -0.5}]}
    assert read("top_logprobs, ids", choice(alone)).next == {1: -0.5}


def test_what_is_no_number_stays_none_and_what_is_infinite_is_very_unlikely() -> None:
    values = {"top_logprobs": [{"a": float("nan"), "b": float("-inf"), "c": -9999.0}]}
    got = read("logprobs, ids", choice(values)).next
    assert math.isnan(got[0]) and got[1] == -1e4 and got[2] == -9999.0


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, choice(None), choice({}), choice({"token_logprobs": 3}), [], "text", None,
     choice({"top_logprobs": [{"a": "x"}]}), {"completion_probabilities": [{}]}],
)  # fmt: skip
@pytest.mark.parametrize("way", BY_NAME)
def test_an_answer_without_numbers_is_a_sentence(way: str, answer: Any) -> None:
    class Fake:
        def post(self, path: str, body: Any) -> Any:
            return answer

    with pytest.raises(Unreadable, match="log-probabilities|other tokens"):
        BY_NAME[way].ask(Fake(), {}, PROMPT, NAMES)  # type: ignore[arg-type]
