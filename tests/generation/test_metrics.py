"""What an adapter is judged by: answers, tokens, forms, and a user's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import counting, problem

from pylora.errors import ConfigError, DataError
from pylora.generation import metrics
from pylora.reference import IGNORE
from pylora.training.evaluate import Measured
from pylora.training.examples import Example
from pylora.training.train import TrainConfig, train


class Words:
    """A tokenizer whose text is the ids."""

    eos_ids = ()
    add_bos = False

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def test_an_example_asks_for_its_last_counted_stretch() -> None:
    one = Example.of([5, 6, 7, 8, 9], [False, False, True, True, True])
    assert metrics.question(one) == metrics.Question([5, 6], [7, 8, 9])
    two = Example.of([1, 2, 3, 4, 5, 6], [False, True, True, False, True, True])
    assert metrics.question(two) == metrics.Question([1, 2, 3, 4], [5, 6])
    assert metrics.question(Example.of([1, 2, 3], [True] * 3)) is None
    assert [int(x) for x in one.labels if x != IGNORE] == [7, 8, 9]


@pytest.fixture(scope="module")
def learnt() -> Any:
    model, adapter = problem("numpy", target_modules="all-linear")
    train(model, adapter, counting(), TrainConfig(learning_rate=0.02, steps=80, batch_size=12))
    return model


def test_answers_that_were_learnt_are_right(learnt: Any) -> None:
    asked = metrics.metrics(["exact", "token-accuracy", "json", r"regex:^\d+"])
    judge = metrics.Judge(learnt, Words(), counting(), asked, ["3 10", "0 7"])
    got = judge()
    assert isinstance(got, Measured) and got.metrics["token_accuracy"] > 0.9
    assert got.metrics["regex"] == 1.0
    assert [sample["prompt"] for sample in got.samples] == ["3 10", "0 7"]
    examples = counting()
    right = counted = 0
    for e in examples:  # token accuracy, one example at a time
        logits, _ = learnt.forward(e.ids)
        keep = e.labels != IGNORE
        right += int((np.asarray(logits).argmax(-1)[keep] == e.labels[keep]).sum())
        counted += int(keep.sum())
    assert got.metrics["token_accuracy"] == right / counted


def test_exact_and_json_judge_texts() -> None:
    exact, form = metrics.metric("exact").of, metrics.metric("json").of
    assert exact is not None and form is not None
    assert (exact("a", "a"), exact("a", "b")) == (1.0, 0.0)
    assert [form(text, "") for text in ('{"a": 1}', "[", "{'a': 1}", "3")] == [1.0, 0.0, 0.0, 1.0]
    assert form("[" * 100_000, "") == 0.0


def test_a_function_of_ones_own(tmp_path: Path, learnt: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def same(answer, expected):\n    return answer[:1] == expected[:1]\n"
        "def bad(answer, expected):\n    return 1 / 0\n"
        "def odd(answer, expected):\n    return 'many'\n"
        "def nan(answer, expected):\n    return float('nan')\n"
    )
    (asked,) = metrics.metrics([f"{file}:same"])
    judge = metrics.Judge(learnt, Words(), counting(4), [asked])
    assert 0 <= judge().metrics["same"] <= 1
    for name, says in (("bad", "ZeroDivisionError"), ("odd", "ValueError"), ("nan", "gave nan")):
        function = metrics.metric(f"{file}:{name}").of
        assert function is not None
        with pytest.raises(ConfigError, match=says):
            function("a", "b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("exct", "there are exact, token-accuracy"),
        ("regex:(", "no regular expression"),
        ("gone.py:f", "there is no file gone.py"),
        ("", "there is no metric"),
    ],
)
def test_a_metric_that_is_none_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        metrics.metric(text)


def test_a_file_that_has_no_such_function_or_does_not_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def there(a, b):\n    return 1\n")
    with pytest.raises(ConfigError, match="no function gone; it has there"):
        metrics.metric(f"{file}:gone")
    file.write_text("def f(:\n")
    with pytest.raises(ConfigError, match="SyntaxError"):
        metrics.metric(f"{file}:f")
    with pytest.raises(ConfigError, match="two metrics are called exact_match"):
        metrics.metrics(["exact", "exact"])


def test_a_text_without_a_prompt_has_only_its_tokens() -> None:
    model, _ = problem("numpy")
    text = [Example.of([1, 2, 3], [True] * 3, "data:1")]
    assert (
        "token_accuracy"
        in metrics.Judge(model, Words(), text, metrics.metrics(["token-accuracy"]))().metrics
    )
    with pytest.raises(DataError, match="data:1: a text without a prompt"):
        metrics.Judge(model, Words(), text, metrics.metrics(["exact"]))
