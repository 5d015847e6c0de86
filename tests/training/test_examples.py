"""Training records: what becomes of each kind, and that no bad record passes unnoticed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.errors import ConfigError, DataError, WrongTypeError
from pylora.model.config import LlamaConfig
from pylora.reference import IGNORE
from pylora.text.chat import Rendered
from pylora.text.conversation import conversation
from pylora.training.examples import Example, check_examples, digest, load_examples

BOS, EOS = 1, 2


class Characters:
    """A tokenizer of characters: "a" is 10, "b" is 11, "\\n" is 3, "<" is BOS, ">" is EOS."""

    eos_ids: Sequence[int] = (EOS,)
    add_bos = False
    own = {"\n": 3, "<": BOS, ">": EOS}
    closes_turns = True

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        ids = [self.own.get(c, ord(c) - ord("a") + 10) for c in text]
        return [BOS, *ids] if bos else ids

    bos_in_chat = False

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def encode_pair(self, prompt: str, rest: str, *, bos: bool = False) -> tuple[list[int], int]:
        before = self.encode(prompt, bos=bos)
        return before + self.encode(rest), len(before)

    def encode_spans(self, text: str, *, bos: bool = False) -> tuple[list[int], Any]:
        return self.encode(text, bos=bos), [(i, i + 1) for i in range(len(text))]

    def apply_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Any = None,
        documents: Any = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        end = ">\n" if self.closes_turns else "\n"
        head = "".join(f"<t\n{t['function']['name']}{end}" for t in tools or ())
        head += "".join(f"<d\n{d}{end}" for d in documents or ())
        head += "".join(f"<k\n{v}{end}" for v in (arguments or {}).values())
        turns = [
            f"<{m['role'][0]}\n{m.get('reasoning_content', '')}{m['content']}"
            + "".join(c["function"]["name"] for c in m.get("tool_calls", ()))
            + end
            for m in messages
        ]
        return head + "".join(turns) + ("<a\n" if add_generation_prompt else "")

    def render(
        self, messages: Sequence[Mapping[str, Any]], add: bool = False, **options: Any
    ) -> Any:
        return Rendered(self.apply_chat(messages, add, **options), [])

    def conversation(self, messages: Any, **options: Any) -> Any:
        return conversation(self, messages, **options)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def load(tmp_path: Path, *records: object, tokenizer: Any = None, **options: Any) -> Any:
    file = write(tmp_path / "data.jsonl", *records)
    return load_examples(file, tokenizer or Characters(), **options)


def test_prompt_and_completion(tmp_path: Path) -> None:
    (e,) = load(tmp_path, {"prompt": "ab", "completion": "cd", "id": 7})
    assert e.ids.tolist() == [10, 11, 12, 13]
    assert e.labels.tolist() == [IGNORE, 12, 13, EOS]
    assert e.ids.dtype == e.labels.dtype == np.int64
    assert e.label_count == 3 and e.where.endswith("data.jsonl:1")


def test_an_end_that_is_written_out_is_not_repeated(tmp_path: Path) -> None:
    (e,) = load(tmp_path, {"prompt": "a", "completion": "b>"})
    assert e.labels.tolist() == [11, EOS]


def test_text_counts_every_token_but_the_first(tmp_path: Path) -> None:
    (e,) = load(tmp_path, {"text": "abc"})
    assert e.ids.tolist() == [10, 11, 12] and e.labels.tolist() == [11, 12, EOS]


def test_the_begin_token_comes_once_where_the_tokenizer_wants_it(tmp_path: Path) -> None:
    tokenizer = Characters()
    tokenizer.add_bos = True
    (pair,) = load(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer=tokenizer)
    (text,) = load(tmp_path, {"text": "a"}, tokenizer=tokenizer)
    assert pair.ids.tolist() == [BOS, 10, 11] and pair.labels.tolist() == [IGNORE, 11, EOS]
    assert text.ids.tolist() == [BOS, 10] and text.labels.tolist() == [10, EOS]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_messages_count_assistant_turns_and_their_ends_only(tmp_path: Path) -> None:
    chat = [turn("user", "b"), turn("assistant", "cd"), turn("user", "e"), turn("assistant", "f")]
    (e,) = load(tmp_path, {"messages": chat})
    tokens = Characters().encode(Characters().apply_chat(chat))
    assert e.ids.tolist() == tokens[:-2]  # without the last ">" and the line break behind it
    counted = [(i, t) for i, t in enumerate(e.labels.tolist()) if t != IGNORE]
    assert [t for _, t in counted] == [12, 13, EOS, 15, EOS]
    assert all(tokens[i + 1] == t for i, t in counted)


def test_a_template_that_leaves_turns_open_is_closed_at_the_end(tmp_path: Path) -> None:
    tokenizer = Characters()
    tokenizer.closes_turns = False
    chat = [turn("user", "b"), turn("assistant", "c")]
    (e,) = load(tmp_path, {"messages": chat}, tokenizer=tokenizer)
    assert [t for t in e.labels.tolist() if t != IGNORE] == [12, 3, EOS]


def test_a_template_that_rewrites_the_past_gives_an_example_for_each_turn(tmp_path: Path) -> None:
    class Forgets(Characters):
        """Shows the assistant's last turn alone, as templates that strip earlier thinking do."""

        def apply_chat(
            self, messages: Sequence[Mapping[str, Any]], add: bool = False, **options: Any
        ) -> str:
            last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
            if messages[-1]["role"] != "assistant":
                last = len(messages)
            shown = [
                m if m["role"] != "assistant" or i == last else {**m, "content": ""}
                for i, m in enumerate(messages)
            ]
            return super().apply_chat(shown, add, **options)

    chat = [turn("user", "b"), turn("assistant", "cd"), turn("user", "e"), turn("assistant", "f")]
    made = load(tmp_path, {"messages": chat}, tokenizer=Forgets())
    learnt = [[t for t in e.labels.tolist() if t != IGNORE] for e in made]
    assert learnt == [[12, 13, EOS], [15, EOS]]
    assert ["an example for each turn" in note for note in made.notes] == [True]


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "ab"}\r\n\n  \n{"text": "c"}')
    assert [e.where[-2:] for e in load_examples(file, Characters())] == [":1", ":4"]


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a", "completion": ', "not JSON"),
        (b'["a", "b"]', "must be a JSON object, not an array"),
        (b"3", "must be a JSON object, not a number"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8 at byte 12"),
        (b'{"prompt": "a"}', "field 'completion' is missing"),
        (b'{"completion": "a"}', "field 'prompt' is missing"),
        (b'{"prompt": "a", "completion": " "}', "field 'completion' is empty"),
        (b'{"prompt": "", "completion": "b"}', "field 'prompt' is empty"),
        (b'{"prompt": "a", "completion": 3}', "'completion' must be a string, not a number"),
        (b'{"prompt": null, "completion": "b"}', "'prompt' must be a string, not null"),
        (b'{"prompt": "a", "completion": "\\ud800"}', "half of a UTF-16 surrogate pair"),
        (b'{"prompt": "a", "completion": "b", "text": "c"}', "mixes prompt and completion with"),
        (b'{"text": "abc"}', "has text, but the one at .*:1 has prompt and completion"),
        (b'{"question": "a"}', "this one has 'question'.*--fields prompt=question"),
        (b"{}", "this one has no field"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "occurs twice"),
        (b"[" * 100_000, "not a usable JSON value|not JSON"),
        (b'{"prompt": "a", "completion": 1' + b"0" * 5000 + b"}", "not a usable JSON|a number"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        load_examples(file, Characters())
    assert str(caught.value).startswith(f"{file}:2: ")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "'messages' must be an array, not a string"),
        ([], "no assistant turn"),
        ([turn("user", "a")], "no assistant turn"),
        ([turn("user", "a"), "b"], r"messages\[1\] must be an object, not a string"),
        (
            [turn("user", "a"), {"role": "assistant"}],
            r"messages\[1\]: the field 'content' is missing",
        ),
        (
            [turn("user", "a"), turn("assistant", "")],
            r"messages\[1\]: the field 'content' is empty",
        ),
        ([{"role": 1, "content": "a"}], r"messages\[0\]: the field 'role' must be a string"),
        (
            [turn("user", [{"type": "image"}])],
            r"messages\[0\]: part 0 of the content is of type 'image'",
        ),  # type: ignore[arg-type]
    ],
)
def test_bad_messages_are_named(tmp_path: Path, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"data.jsonl:1: (?:.*){message}|:1: {message}"):
        load(tmp_path, {"messages": messages})


def test_files_without_records(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match="no records"):
        load_examples(tmp_path / "empty.jsonl", Characters())
    with pytest.raises(DataError, match="missing.jsonl: cannot be read"):
        load_examples(tmp_path / "missing.jsonl", Characters())
    with pytest.raises(DataError, match="is a directory; name one of its files: empty.jsonl"):
        load_examples(tmp_path, Characters())


def test_a_tokenizer_without_an_end_cannot_teach_to_stop(tmp_path: Path) -> None:
    tokenizer = Characters()
    tokenizer.eos_ids = ()
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load(tmp_path, GOOD, tokenizer=tokenizer)


def test_too_long_is_an_error_or_a_counted_cut(tmp_path: Path) -> None:
    records = [{"prompt": "ab", "completion": "cdef"}, GOOD]
    with pytest.raises(DataError, match=r":1: the record has 7 tokens, more than max_length 5"):
        load(tmp_path, *records, max_length=5)
    cut = load(tmp_path, *records, max_length=5, too_long="truncate")
    assert cut.truncated == 1 and len(cut) == 2
    assert cut[0].labels.tolist() == [IGNORE, 12, 13, 14]
    assert load(tmp_path, *records, max_length=7).truncated == 0
    with pytest.raises(DataError, match="nothing left to learn"):
        load(tmp_path, *records, max_length=2, too_long="truncate")
    with pytest.raises(ConfigError, match="too_long"):
        load(tmp_path, GOOD, too_long="drop")
    with pytest.raises(ConfigError, match="max_length"):
        load(tmp_path, GOOD, max_length=1)


@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=2, max_size=20))
def test_shifting(pairs: list[tuple[int, bool]]) -> None:
    tokens, counted = zip(*pairs)
    if not any(counted[1:]):
        with pytest.raises(DataError, match="no token to learn"):
            Example.of(tokens, counted)
        return
    e = Example.of(tokens, counted)
    seen = {i + 1: int(t) for i, t in enumerate(e.labels) if t != IGNORE}
    assert seen == {i: t for i, (t, c) in enumerate(pairs) if c and i > 0}
    assert e.ids.tolist() == list(tokens[: len(e)])
    assert e.labels[-1] != IGNORE


def test_the_digest_is_of_ids_labels_and_order() -> None:
    a, b = Example.of([1, 2, 3], [True] * 3, "here"), Example.of([1, 2], [True] * 2)
    other = Example.of([1, 2, 3], [False, False, True], "here")
    assert digest([a, b]) == digest([Example.of([1, 2, 3], [True] * 3, "there"), b])
    assert len({digest(x) for x in ([a, b], [b, a], [a], [other, b])}) == 4


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example.of([1, 61, 2], [True] * 3, "f:3"), "f:3: token 61 is outside .* of 61"),
        (Example.of([1, 2, 99], [True] * 3, "f:3"), "f:3: label 99 is outside"),
        (Example(np.array([-1]), np.array([2]), "f:3"), "f:3: token -1 is outside"),
        (
            Example.of([1] * 130, [True] * 130, "f:3"),
            "f:3: 129 tokens, more than the 128 positions",
        ),
        (Example(np.array([1]), np.array([IGNORE]), "f:3"), "f:3: no label counts"),
        (Example(np.array([1, 2]), np.array([2]), "f:3"), "f:3: ids and labels"),
        (Example.of([1] * 12, [True] * 12, "f:3"), "f:3: 11 tokens, more than max_tokens 10"),
    ],
)
def test_examples_that_a_model_cannot_take(example: Example, message: str) -> None:
    limit = 10 if "max_tokens" in message else None
    with pytest.raises(DataError, match=message):
        check_examples([example], LlamaConfig.tiny(), "training", limit)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fields": {"prompt": "q"}}, "fields takes a text, such as 'prompt=question"),
        ({"max_length": "9"}, "max_length is a number of tokens, not the text '9'"),
        ({"template_args": ["a"]}, "template_args takes a dict such as"),
    ],
)
def test_settings_of_a_wrong_type_say_what_to_pass(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(WrongTypeError, match=says):
        load_examples([{"prompt": "a", "completion": "b"}], Characters(), **settings)


def test_the_name_of_a_field_is_a_text() -> None:
    with pytest.raises(WrongTypeError, match=r"data\[0\]: a field's name is the number 5"):
        load_examples([{"text": "a", 5: 6}], Characters())
