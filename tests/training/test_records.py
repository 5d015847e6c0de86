"""Records as other tools write them: carried out, refused by name, or passed over; docs/data.md
says which, and its tables are tested here line by line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pylora.errors import ConfigError, DataError
from pylora.training.fields import CARRIED, MESSAGE, MESSAGE_REFUSED, REFUSED, Fields
from pylora.training.records import Conversation, Notes, Pair, Text, interpret

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, ANSWER]}
PAIR = {"prompt": "a", "completion": "b"}


def read(record: dict[str, Any], fields: str | None = None) -> tuple[Any, list[str]]:
    notes = Notes()
    _, content = interpret(record, "here:1", Fields.parse(fields), notes)
    return content, notes.lines()


def roles(content: Conversation) -> list[str]:
    return [m["role"] for m in content.messages]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


# ---- the kinds and their conversions -------------------------------------------------------------


def test_the_three_plain_kinds() -> None:
    assert read({"text": "a"})[0] == Text("a")
    assert read(PAIR | {"id": 7, "source": "x", "score": 0.5})[0] == Pair("a", "b")
    content, notes = read(CHAT)
    assert content == Conversation([USER, ANSWER], [False, True]) and notes == []


def test_sharegpt() -> None:
    turns = [("system", "s"), ("human", "a"), ("function_call", '{"name": "f", "arguments": {}}')]
    turns += [("observation", "o"), ("gpt", "b")]
    record = {"conversations": [{"from": f, "value": v} for f, v in turns]}
    content, notes = read(record | {"tools": json.dumps([TOOL])})
    assert roles(content) == ["system", "user", "assistant", "tool", "assistant"]
    assert content.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    assert content.trained == [False, False, True, False, True]
    assert content.tools == [TOOL]
    assert any("from and value became role and content" in note for note in notes)


def test_alpaca_with_input_system_and_history() -> None:
    record = {"instruction": "do", "input": "x", "output": "y", "system": "s"}
    content, notes = read(record | {"history": [["q", "r"]]})
    assert roles(content) == ["system", "user", "assistant", "user", "assistant"]
    assert content.messages[3]["content"] == "do\nx" and content.messages[4]["content"] == "y"
    assert content.trained == [False, False, True, False, True]
    assert any("Alpaca" in note for note in notes)
    assert read({"instruction": "do", "input": "", "output": "y"})[0].messages[0]["content"] == "do"


def test_a_conversational_prompt_and_completion_trains_the_completion_alone() -> None:
    content, _ = read({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert content.trained == [False, False, False, True]
    with pytest.raises(DataError, match="both be texts, or both be messages"):
        read({"prompt": [USER], "completion": "b"})


def test_ultrachats_prompt_beside_messages_is_compared() -> None:
    content, notes = read(CHAT | {"prompt": "a", "prompt_id": "7"})
    assert content.messages == [USER, ANSWER] and "repeats the first user's" in notes[0]
    with pytest.raises(DataError, match="'prompt' is another text than the first user's message"):
        read(CHAT | {"prompt": "other"})


def test_openais_older_functions_and_calls() -> None:
    answer = {"role": "assistant", "content": None}
    old = answer | {"function_call": {"name": "f", "arguments": '{"x": 1}'}}
    content, notes = read({"messages": [USER, old], "functions": [TOOL["function"]]})
    assert content.tools == [TOOL] and len(notes) == 2
    assert content.messages[1]["tool_calls"] == [CALL] and content.messages[1]["content"] == ""
    new = answer | {"tool_calls": [{**CALL, "id": "1"}]}
    content, _ = read({"messages": [USER, new]})
    assert content.messages[1]["tool_calls"] == [{**CALL, "id": "1"}]


def test_weights_and_marks_say_which_turns_are_learnt() -> None:
    first, second = ANSWER | {"weight": 0}, ANSWER | {"train": True}
    content, _ = read({"messages": [USER, first, USER, second]})
    assert content.trained == [False, False, False, True]
    assert content.messages[1] == ANSWER, "the marks are not the template's"
    for marks, message in (
        ({"weight": 0.5}, "must be 0 or 1"),
        ({"train": "no"}, "must be true or false"),
        ({"weight": 0, "train": True}, "contradict"),
    ):
        with pytest.raises(DataError, match=message):
            read({"messages": [USER, ANSWER | marks]})
    with pytest.raises(DataError, match="asks to train a user's turn"):
        read({"messages": [USER | {"weight": 1}, ANSWER]})
    with pytest.raises(DataError, match="every assistant turn is marked"):
        read({"messages": [USER, first]})


def test_system_and_arguments_are_carried_out() -> None:
    content, _ = read(CHAT | {"system": "s", "chat_template_kwargs": {"enable_thinking": False}})
    assert content.messages[0] == {"role": "system", "content": "s"}
    assert content.trained == [False, False, True]
    assert content.template_args == {"enable_thinking": False}
    with pytest.raises(DataError, match="another text than the system message"):
        read({"messages": [{"role": "system", "content": "t"}, USER, ANSWER], "system": "s"})
    with pytest.raises(DataError, match="must not have 'messages'"):
        read(CHAT | {"chat_template_kwargs": {"messages": []}})


def test_null_means_that_a_field_is_not_there() -> None:
    nulls = {"tools": None, "system": None, "chosen": None, "images": None}
    message = ANSWER | {"tool_calls": None, "weight": None, "images": None}
    content, _ = read(CHAT | nulls | {"messages": [USER | {"name": None}, message]})
    assert content.messages == [USER, ANSWER]
    tool = {"type": "function", "function": {"name": "f", "strict": None, "parameters": {}}}
    assert read(CHAT | {"tools": [tool]})[0].tools == [TOOL]


def test_the_null_fields_of_a_wide_table_are_no_mixture_of_kinds() -> None:
    nulls = dict.fromkeys(["prompt", "completion", "messages", "conversations", "text", "output"])
    assert read(nulls | PAIR)[0] == Pair("a", "b")
    assert read(nulls | {"text": "t"})[0] == Text("t")
    assert read(nulls | CHAT)[0].messages == [USER, ANSWER]
    with pytest.raises(DataError, match="'text' must be a string, not null"):
        read({"text": None})


@pytest.mark.parametrize("history", [5, {"a": 1}, True])
def test_a_history_that_is_no_array_is_an_error(history: Any) -> None:
    with pytest.raises(DataError, match="'history' must be an array"):
        read({"instruction": "a", "output": "b", "history": history})


def test_several_calls_in_one_turn_of_sharegpt() -> None:
    calls = json.dumps([{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}])
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": calls}]
    content, _ = read({"conversations": turns})
    assert [call["name"] for call in content.messages[1]["tool_calls"]] == ["f", "g"]


def test_a_role_in_capitals_is_converted_aloud() -> None:
    content, notes = read({"messages": [USER | {"role": "USER"}, ANSWER | {"role": "Assistant"}]})
    assert roles(content) == ["user", "assistant"] and "'USER' became 'user'" in notes[0]


@pytest.mark.parametrize("name", ["training", "trainable", "train_on_turn", "masked"])
def test_other_names_of_the_mark_of_training_are_not_dropped(name: str) -> None:
    with pytest.raises(DataError, match=rf"messages\[1\]: the field '{name}' .*'train': false"):
        read({"messages": [USER, ANSWER | {name: False}, USER, ANSWER]})


@pytest.mark.parametrize(
    ("role", "near"),
    [("assistent", "assistant"), ("usr", "user"), ("sytem", "system"), ("Asistant", "assistant")],
)
def test_a_misspelt_role_is_named_with_what_was_meant(role: str, near: str) -> None:
    with pytest.raises(DataError, match=rf"messages\[2\]: the role '{role}' .*'{near}'"):
        read({"messages": [USER, ANSWER, {"role": role, "content": "c"}]})


def test_roles_of_other_tools_are_converted_aloud_or_named_by_the_user() -> None:
    content, notes = read({"messages": [USER, {"role": "model", "content": "b"}]})
    assert roles(content) == ["user", "assistant"] and "'model' became 'assistant'" in notes[0]
    content, _ = read({"messages": [{"role": "q", "content": "a"}, ANSWER]}, "user=q")
    assert roles(content) == ["user", "assistant"]


# ---- names of one's own --------------------------------------------------------------------------


def test_fields_of_ones_own() -> None:
    record = {"question": "a", "answer": "b", "label": 1}
    assert read(record, "prompt=question,completion=answer,-label")[0] == Pair("a", "b")
    chat = {"talk": [{"who": "human", "said": "a"}, {"who": "gpt", "said": "b"}]}
    content, _ = read(chat, "messages=talk,role=who,content=said")
    assert content.messages == [USER, ANSWER]
    dolly = {"instruction": "i", "context": "c", "response": "r", "category": "x"}
    assert read(dolly, "input=context,output=response")[0].messages[0]["content"] == "i\nc"
    with pytest.raises(DataError, match="there is no field 'answer', which is to be 'completion'"):
        read({"question": "a"}, "prompt=question,completion=answer")
    with pytest.raises(DataError, match="there is no field 'question', which is to be 'prompt'"):
        read(PAIR, "prompt=question")
    with pytest.raises(DataError, match="but the record has that field, too; drop it with -prompt"):
        read(PAIR | {"question": "q"}, "prompt=question")
    for text, message in (("promt=x", "did you mean 'prompt'"), ("x", "neither OURS=THEIRS")):
        with pytest.raises(ConfigError, match=message):
            Fields.parse(text)


@pytest.mark.parametrize("name", ["mesages", "Tools", "compleation", "systems", "tool", "Chosen"])
def test_a_misspelt_field_is_no_field_that_passes(name: str) -> None:
    with pytest.raises(DataError, match=f"there is no field '{name}'; did you mean"):
        read(CHAT | {name: "x"})
    assert read(CHAT | {name: "x"}, f"-{name}")[0].messages == [USER, ANSWER]


# ---- the tables of docs/data.md ------------------------------------------------------------------


def table(heading: str) -> dict[str, str]:
    """Field -> what becomes of it, of the table below a heading."""
    text = DOCS.read_text(encoding="utf-8").split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", text, re.M)
    return {name: what for names, what in rows for name in re.findall(r"`([^`]+)`", names)}


VALUES: dict[str, Any] = {
    "system": "s",
    "tools": [TOOL],
    "functions": [TOOL["function"]],
    "documents": [{"text": "d"}],
    "chat_template_kwargs": {"x": 1},
}


def test_the_table_of_fields_is_the_codes() -> None:
    said = table("Fields of a record")
    assert {n for n, what in said.items() if what.startswith("carried out")} == set(CARRIED)
    assert {n for n, what in said.items() if what.startswith("refused")} == set(REFUSED)
    assert all(w.startswith(("carried out", "refused", "passed over")) for w in said.values())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_field_that_is_refused_is_named_with_the_way_out(name: str) -> None:
    for record in (CHAT, PAIR, {"text": "a"}):
        with pytest.raises(DataError, match=rf"'{name}'.*--fields=-{name}"):
            read(record | {name: "x"})
        assert read(record | {name: "x"}, f"-{name}")[0] == read(record)[0]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_field_that_is_carried_out_changes_the_conversation_and_is_refused_elsewhere(
    name: str,
) -> None:
    assert read(CHAT | {name: VALUES[name]})[0] != read(CHAT)[0]
    for record in (PAIR, {"text": "a"}):
        with pytest.raises(DataError, match=f"the field '{name}' belongs to a conversation"):
            read(record | {name: VALUES[name]})


def test_what_no_tool_acts_on_is_passed_over() -> None:
    names = [n for n, w in table("Fields of a record").items() if w.startswith("passed over")]
    assert len(names) > 5
    for name in names:
        assert read(CHAT | {name: "x"})[0] == read(CHAT)[0], name


def test_the_table_of_a_messages_fields_is_the_codes() -> None:
    said = table("Fields of a message")
    assert {n for n, what in said.items() if what.startswith("carried out")} == set(MESSAGE)
    assert {n for n, what in said.items() if what.startswith("refused")} == set(MESSAGE_REFUSED)
    for name in MESSAGE_REFUSED:
        with pytest.raises(DataError, match=rf"messages\[1\]: the field '{name}'"):
            read({"messages": [USER, ANSWER | {name: "x"}]})
