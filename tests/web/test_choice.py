"""Stop strings across tokens, entries that go with their text, and calls that are held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pylora.serving.request import Token
from pylora.web.choice import Choice, Piece
from pylora.web.tools import HERMES, LLAMA, MISTRAL, Style, calls_in, must_call, style_of

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters are cut in two."""

    eos_ids = (256,)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def said(
    text: str, stop: Sequence[str] = (), style: Style | None = None
) -> tuple[Choice, list[Piece]]:
    """A text byte by byte, and what came out at each."""
    choice = Choice(0, Bytes(), [1], stop, style)  # type: ignore[arg-type]
    pieces = []
    for byte in text.encode():
        if choice.ended:
            break
        pieces.append(choice.take(Token(byte, -1.0), logs=True))
    pieces.append(choice.finish("cancelled" if choice.ended else "stop"))
    return choice, pieces


def whole(pieces: Sequence[Piece]) -> str:
    return "".join(p.text for p in pieces)


@pytest.mark.parametrize("text", ["plain", "größer als 3 €", "日本語", ""])
def test_text_and_entries_come_whole(text: str) -> None:
    choice, pieces = said(text)
    assert whole(pieces) == text and choice.reason == "stop" and choice.stopped_by is None
    entries = [e for p in pieces for e in p.entries]
    assert [e.token.id for e in entries] == list(text.encode())
    for e, byte_at in zip(entries, range(len(entries))):
        assert e.start == len(text.encode()[:byte_at].decode("utf-8", "ignore"))


def test_a_stop_string_over_tokens_leaves_no_trace() -> None:
    choice, pieces = said("one STOP two", ["STOP"])
    assert whole(pieces) == "one " and choice.stopped_by == "STOP" and choice.reason == "stop"
    assert [e.token.id for p in pieces for e in p.entries] == list(b"one ")


def test_the_first_of_several_stop_strings_counts() -> None:
    choice, pieces = said("a,b;c", [";", ","])
    assert whole(pieces) == "a" and choice.stopped_by == ","


def test_what_only_begins_like_a_stop_string_is_given_at_the_end() -> None:
    choice, pieces = said("one STO", ["STOP"])
    assert whole(pieces) == "one STO" and choice.stopped_by is None
    assert pieces[-1].text == "STO" and [e.token.id for e in pieces[-1].entries] == list(b"STO")


def test_no_piece_has_half_a_character() -> None:
    _, pieces = said("für €")
    assert not any("\ufffd" in p.text for p in pieces)


# ---- calls of tools ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, CALL),
        (MISTRAL, '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]'),
        (LLAMA, '{"name": "add", "parameters": {"a": 1}}'),
        (LLAMA, '<|python_tag|>{"name": "add", "parameters": "{\\"a\\": 1}"}'),
    ],
)
def test_calls_of_each_form_are_found_and_never_shown_as_text(style: Style, text: str) -> None:
    choice, pieces = said(text, style=style)
    assert whole(pieces) == "" and choice.reason == "tool_calls"
    (call,) = pieces[-1].calls
    assert call.name == "add" and call.arguments == '{"a": 1}'
    object_ = call.said()
    assert object_["type"] == "function" and object_["function"]["name"] == "add"
    assert call.said(0)["index"] == 0


def test_text_before_a_call_streams() -> None:
    choice, pieces = said("Let me see. " + CALL + "\n" + CALL, style=HERMES)
    assert whole(pieces).strip() == "Let me see." and len(pieces[-1].calls) == 2
    assert pieces[3].text == " "


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (HERMES, "<tool_call> is a tag"),
        (HERMES, "a <b> c <tool"),
        (HERMES, '<tool_call>{"name": 3}</tool_call>'),
        (LLAMA, '{"a": 1}'),
        (LLAMA, "{ set theory"),
        (LLAMA, "[1, 2]"),
        (MISTRAL, "[TOOL_CALLS] none"),
    ],
)
def test_what_is_no_call_stays_text(style: Style, text: str) -> None:
    choice, pieces = said(text, style=style)
    assert whole(pieces) == text and choice.reason == "stop"


def test_deep_json_is_no_call() -> None:
    assert calls_in("<tool_call>" + "[" * 100000, HERMES)[1] == []


def test_styles_are_told_by_the_template() -> None:
    assert style_of("... <tool_call> ...") is HERMES and style_of("[TOOL_CALLS]") is MISTRAL
    assert style_of("""{"name": f, "parameters": p}""") is LLAMA
    assert style_of("{{ messages }}") is None


def test_a_call_that_must_come_names_what_is_wrong() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    named = {"type": "function", "function": {"name": "sub"}}
    with pytest.raises(Exception, match="'sub', which is none of the tools"):
        must_call(HERMES, tools, named)
    with pytest.raises(Exception, match="is not known"):
        must_call(None, tools, "required")
    with pytest.raises(Exception, match="there are no tools"):
        must_call(HERMES, (), "required")
    assert must_call(HERMES, tools, "auto") is None
