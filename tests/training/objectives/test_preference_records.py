"""Records of preferences: TRL's forms, and a sentence with file and line for what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

from pylora.adapters.own_tokenizer import tokenizer_of
from pylora.errors import DataError
from pylora.formats import open_checkpoint
from pylora.training.objectives.answers import Answer
from pylora.training.objectives.preference_records import load_preferences, load_verdicts

USER = {"role": "user", "content": "time?"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("now", "never"))
TEXTS = {"prompt": "time equals", "chosen": " truth", "rejected": " change"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with open_checkpoint(write_tiny_model(tmp_path_factory.mktemp("tiny"))) as checkpoint:
        return tokenizer_of(checkpoint, ())


def text(tokenizer: Any, answer: Answer) -> tuple[str, str]:
    """What stands before the answer, and the answer with its end."""
    tokens = [*answer.ids.tolist(), int(answer.targets[-1])]
    first = answer.counted.tolist().index(True) + 1
    return tuple(  # type: ignore[return-value]
        tokenizer.decode(part, skip_special_tokens=False)
        for part in (tokens[:first], tokens[first:])
    )


ASKED = "<|im_start|>user\ntime?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "time?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "time?", "chosen": [GOOD], "rejected": [BAD], "score": 3, "source": "x"},
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    ],
)
def test_conversations(record: dict[str, Any], tokenizer: Any) -> None:
    (item,) = load_preferences([record], tokenizer)
    assert text(tokenizer, item.chosen) == (ASKED, "now<|im_end|>")
    assert text(tokenizer, item.rejected) == (ASKED, "never<|im_end|>")


def test_texts(tokenizer: Any, tmp_path: Path) -> None:
    implicit = {"chosen": "time equals truth", "rejected": "time equals change"}
    for record in (TEXTS, implicit, TEXTS | {"system": None, "tools": []}):
        file = tmp_path / "pairs.jsonl"
        file.write_text(json.dumps(record) + "\n")
        (item,) = load_preferences(file, tokenizer)
        assert text(tokenizer, item.chosen) == ("time equals", " truth<|im_end|>")
        assert text(tokenizer, item.rejected) == ("time equals", " change<|im_end|>")
        assert item.where == f"{file}:1" and len(item) == len(item.chosen) + len(item.rejected)
    renamed = {"q": "time equals", "yes": " truth", "no": " change"}
    fields = "prompt=q,chosen=yes,rejected=no"
    (again,) = load_preferences([renamed], tokenizer, fields=fields)
    assert again.chosen.digest == item.chosen.digest


def test_tools_and_system_reach_the_template(tokenizer: Any) -> None:
    record = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": "brief"}
    (item,) = load_preferences([record], tokenizer)
    assert text(tokenizer, item.chosen)[0].startswith("<|im_start|>system\nbrief<|im_end|>")


def test_cut_to_a_length(tokenizer: Any) -> None:
    record = TEXTS | {"chosen": " truth" * 30}
    with pytest.raises(DataError, match=r"data\[0\]: the record has .* more than max_length"):
        load_preferences([record], tokenizer, max_length=20)
    items = load_preferences([record], tokenizer, max_length=20, too_long="truncate")
    assert items.truncated == 1 and len(items[0].chosen) == 19
    same = {"prompt": "time", "chosen": " truth" * 30, "rejected": " truth" * 31}
    with pytest.raises(DataError, match="the same tokens once they are encoded and cut"):
        load_preferences([same], tokenizer, max_length=20, too_long="truncate")


PAIRS: list[tuple[Any, str]] = [
    ({"prompt": "a", "chosen": "b"}, "there is no 'rejected' answer.*this one has 'prompt'"),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "there is no 'rejected' answer"),
    ({"prompt": "a", "rejected": "b"}, "there is no 'chosen' answer"),
    ({"prompt": "a", "completion": "b"}, "there is no 'chosen' answer"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "'rejected' is empty"),
    ({"prompt": " ", "chosen": "b", "rejected": "c"}, "'prompt' is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, so there is nothing"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must be a string"),
    ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "must both be texts, or both be messages"),
    ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "'prompt' is messages"),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [USER]}, "no assistant"),
    ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "no assistant"),
    ({"prompt": [USER], "chosen": ["now"], "rejected": [BAD]}, r"chosen\[0\] must be an object"),
    ({"chosen": "yes", "rejected": "no"}, "do not begin alike"),
    ({"chosen": "time", "rejected": "time flies"}, "'chosen' is only the beginning"),
    ({"chosen": [GOOD], "rejected": [BAD]}, "do not begin alike"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}, "'chosen' has no assistant"),
    (TEXTS | {"label": True}, "'chosen' and 'label'"),
    (TEXTS | {"chosenn": "x"}, "did you mean 'chosen'"),
    (TEXTS | {"system": "x"}, "'system' belongs to a conversation"),
    (TEXTS | {"images": ["x"]}, "'images' cannot be trained on"),
    ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "'input' must have 'messages'"),
    ([], "must be a JSON object"),
]


@pytest.mark.parametrize("record, message", PAIRS)
def test_a_record_that_is_no_preference_is_named(
    record: Any, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(TEXTS) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=message) as error:
        load_preferences(file, tokenizer)
    assert str(error.value).startswith(f"{file}:2: ")


def test_one_kind_a_file(tokenizer: Any) -> None:
    other = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    with pytest.raises(DataError, match=r"data\[1\]: this record has messages, but .* has texts"):
        load_preferences([TEXTS, other], tokenizer)


# ---- verdicts ------------------------------------------------------------------------------------


def test_verdicts(tokenizer: Any) -> None:
    records = [
        {"prompt": "time equals", "completion": " truth", "label": True},
        {"prompt": "all is", "completion": " change", "label": False},
        {"prompt": "time", "completion": " flies", "label": "false"},
    ]
    items = load_verdicts(records, tokenizer)
    assert [i.desirable for i in items] == [True, False, False]
    assert text(tokenizer, items[0].answer) == ("time equals", " truth<|im_end|>")
    assert [text(tokenizer, i.other) for i in items] == [
        ("time equals", " flies<|im_end|>"),
        ("all is", " truth<|im_end|>"),
        ("time", " change<|im_end|>"),
    ]


def test_pairs_become_verdicts(tokenizer: Any) -> None:
    items = load_verdicts([TEXTS], tokenizer)
    assert [i.desirable for i in items] == [True, False]
    assert "chosen became a desirable answer" in items.notes[0]
    chat = {"prompt": [USER], "completion": [GOOD], "label": 1}
    items = load_verdicts([chat, chat | {"completion": [BAD]}], tokenizer)
    assert text(tokenizer, items[1].answer) == (ASKED, "never<|im_end|>")
    assert "every answer is desirable" in items.notes[0]


JUDGED = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    "record, message",
    [
        ({"prompt": "a", "completion": "b"}, "there is no 'label'"),
        ({"prompt": "a", "label": True}, "there is no 'completion'"),
        ({"completion": "a", "label": True}, "there is no 'prompt'"),
        (JUDGED | {"label": 2}, "'label' is 2; it must be true"),
        (JUDGED | {"label": "good"}, "'label' is 'good'"),
        (JUDGED | {"label": [True]}, r"'label' is \[True\]"),
        (JUDGED | {"completion": ""}, "'completion' is empty"),
        (JUDGED | {"prompt": "a", "chosen": "x"}, "there is no 'rejected' answer"),
    ],
)
def test_a_record_that_is_no_verdict_is_named(record: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_verdicts([JUDGED, record], tokenizer)
    assert str(error.value).startswith("data[1]: ")


def test_one_answer_alone_has_no_other(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="one answer alone"):
        load_verdicts([JUDGED], tokenizer)
    with pytest.raises(DataError, match="the file has no records"):
        load_verdicts([], tokenizer)
