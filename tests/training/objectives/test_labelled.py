"""Records of texts with a class or a number; a label that is none is named with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from pylora.adapters.own_tokenizer import tokenizer_of
from pylora.errors import ConfigError, DataError
from pylora.formats import open_checkpoint
from pylora.training.objectives.choose import read
from pylora.training.objectives.labelled import load_classes, load_numbers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with open_checkpoint(write_tiny_model(tmp_path_factory.mktemp("tiny"))) as checkpoint:
        return tokenizer_of(checkpoint, ())


def records(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"time is {i}", "label": label} for i, label in enumerate(labels)]


def test_numbers_and_names(tokenizer: Any) -> None:
    items = load_classes(records(0, 2, 1, 1), tokenizer)
    assert items.classes == ("0", "1", "2") and [t.label for t in items] == [0, 2, 1, 1]
    assert tokenizer.decode(items[1].ids) == "time is 1" and items[1].where == "data[1]"
    items = load_classes(records("yes", "no", "yes"), tokenizer)
    assert items.classes == ("no", "yes") and [t.label for t in items] == [1, 0, 1]
    items = load_classes(records(1, "yes".replace("yes", "1"), "0"), tokenizer, classes="2")
    assert [t.label for t in items] == [1, 1, 0]
    items = load_classes(records("b"), tokenizer, classes=" a, b ")
    assert items.classes == ("a", "b") and items[0].label == 1
    assert load_classes(records(True, False), tokenizer).classes == ("0", "1")
    assert [t.label for t in load_numbers(records(0.5, -2, "1e1"), tokenizer)] == [0.5, -2, 10]


def test_messages_go_through_the_template(tokenizer: Any) -> None:
    record = {"messages": [{"role": "user", "content": "time?"}], "label": 0}
    items = load_classes([record, record | {"label": 1}], tokenizer)
    text = tokenizer.decode(items[0].ids, skip_special_tokens=False)
    assert text == "<|im_start|>user\ntime?<|im_end|>\n"


def test_evaluation_has_the_classes_of_training(tokenizer: Any) -> None:
    both = read("classify", records("b", "a"), records("b"), tokenizer)
    assert both[1] is not None and both[1][0].label == 1
    with pytest.raises(DataError, match=r"data\[0\]: 'label' is 'c', which is no class; they are"):
        read("classify", records("b", "a"), records("c"), tokenizer)
    with pytest.raises(DataError, match=r"data\[0\]: 'label' is 2, out of range"):
        read("classify", records(0, 1), records(2), tokenizer)
    with pytest.raises(ConfigError, match="classes are no setting of the objective regress"):
        read("regress", records(0, 1), None, tokenizer, classes="2")


@pytest.mark.parametrize(
    "labels, classes, message",
    [
        ((0, 3), "3", r"'label' is 3, out of range: there are 3 classes, 0 to 2"),
        ((0, -1), "3", "'label' is -1; a class is a whole number"),
        ((0, 1.5), None, "'label' is 1.5; a class is a whole number"),
        ((0, [1]), None, r"'label' is \[1\]; a class"),
        ((0, 7), None, "'label' is 7, but no record has class 1; say .* --classes 8"),
        ((0, "yes"), None, "this label is a name, others of the file are numbers"),
        (("no", "yess"), "no,yes", "'label' is 'yess', which is no class"),
        ((0, None), None, "there is no 'label'"),
    ],
)
def test_a_label_that_is_no_class_is_named(
    labels: Any, classes: Any, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records(*labels)))
    with pytest.raises(DataError, match=message) as error:
        load_classes(file, tokenizer, classes=classes)
    assert str(error.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "", "label": 1}, "'text' is empty"),
        ({"label": 1}, "'text' is missing"),
        ({"prompt": "a", "label": 1}, "this one has 'prompt'; say what it is"),
        ({"text": "a", "messages": [], "label": 1}, "'messages' and 'text'"),
        ({"text": "a", "label": 1, "texts": 3}, "did you mean 'text'"),
        ({"text": "a " * 50, "label": 1}, "more than max_length 20"),
    ],
)
def test_a_record_that_is_no_text_is_named(record: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_classes([*records(0), record], tokenizer, max_length=20)
    assert str(error.value).startswith("data[1]: ")


@pytest.mark.parametrize("label", ["high", True, float("nan"), [1], {}])
def test_a_label_that_is_no_number_is_named(label: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"data\[0\]: 'label' is .*; it must be a number"):
        load_numbers(records(label), tokenizer)


@pytest.mark.parametrize("classes", ["1", "0", "a", "a,,b", "a,a", 3])
def test_classes_that_are_none(classes: Any, tokenizer: Any) -> None:
    with pytest.raises((ConfigError, TypeError)):
        load_classes(records("a", "b"), tokenizer, classes=classes)


def test_one_class_is_nothing_to_learn(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="every record is of class 'a'"):
        load_classes(records("a", "a"), tokenizer)


def test_cut_to_a_length(tokenizer: Any) -> None:
    long = {"text": "time " * 50, "label": 1}
    items = load_classes([*records(0), long], tokenizer, max_length=20, too_long="truncate")
    assert items.truncated == 1 and len(items[1]) == 20
