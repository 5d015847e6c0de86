"""What is in a record: a text, a prompt with its completion, or a conversation.

Records of other tools (ShareGPT, Alpaca, OpenAI's older functions) become one of these; what was
converted is counted, so that it can be said aloud. Which field becomes what is decided in
fields.py. No tokenizer is known here. Every error is a DataError that begins with the place.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import DataError
from pylora.training.fields import Fields, check, check_message, role_of
from pylora.training.reading import type_name

Message = dict[str, Any]
PLAIN = Fields({}, {}, frozenset())

KINDS: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages", "conversations", "conversation"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
_OF_CHAT = ("tools", "functions", "documents", "chat_template_kwargs", "system", "history", "input")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True)
class Text:
    """Trained whole."""

    text: str


@dataclass(frozen=True)
class Pair:
    """The completion is trained."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them; trained[i] says whether message i is learnt."""

    messages: Sequence[Message]
    trained: Sequence[bool]
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Notes:
    """What was converted, by sentence, and how often."""

    counts: Counter[str] = field(default_factory=Counter)

    def say(self, sentence: str) -> None:
        self.counts[sentence] += 1

    def lines(self) -> list[str]:
        """ "312 records: ShareGPT's from and value became role and content", ..."""
        return [f"{n} x {sentence}" for sentence, n in self.counts.items()]


def interpret(
    record: Mapping[str, Any], where: str, fields: Fields = PLAIN, notes: Notes | None = None
) -> tuple[str, Text | Pair | Conversation]:
    """(kind, content) of a record; `kind` is the one of KINDS that its form was.

    A field that is null is not there. Raises DataError for a field that is refused, missing,
    empty or of the wrong type, for a mixture of kinds, and for roles that are unknown.
    """
    notes = Notes() if notes is None else notes
    named = fields.rename(record, where)
    for ours, theirs in fields.names.items():
        if (
            ours not in ("role", "content")
            and ours not in named
            and ours not in ("input", "system")
        ):
            raise DataError(f"{where}: there is no field {theirs!r}, which is to be {ours!r}")
    check(named, where, any(name in named for names in KINDS.values() for name in names))
    said = _without_nulls(named)
    kind = kind_of(said, where)
    if kind != "messages":  # its other names are no parts of it
        said |= {k: named[k] for k in KINDS[kind] if k in named}
    named = said
    if kind == "text":
        _no_others(named, where, "text")
        return kind, Text(string(named, "text", where))
    if kind == "prompt and completion":
        if isinstance(named.get("prompt"), list) or isinstance(named.get("completion"), list):
            return kind, _two_parts(named, where, fields, notes)
        _no_others(named, where, "a prompt and a completion")
        return kind, Pair(string(named, "prompt", where), string(named, "completion", where))
    if kind == "instruction and output":
        return kind, _instruction(named, where, notes)
    return kind, _conversation(named, where, fields, notes)


def _without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are there; a record of nulls alone keeps those that say what it is to be."""
    said = {k: v for k, v in record.items() if v is not None}
    names = [name for kind in KINDS.values() for name in kind if name in record]
    if not any(name in said for name in names):
        said |= dict.fromkeys(names)
    return said


def kind_of(record: Mapping[str, Any], where: str) -> str:
    """Which of KINDS a record is. DataError for none, or for a mixture."""
    kinds = [kind for kind, names in KINDS.items() if any(name in record for name in names)]
    if kinds[:2] == ["prompt and completion", "messages"] and "completion" not in record:
        kinds.remove("prompt and completion")  # ultrachat's first turn, once more: compared below
    if not kinds:
        has = ", ".join(repr(name) for name in list(record)[:8]) or "no field"
        raise DataError(
            f"{where}: a record must have 'prompt' and 'completion', or 'messages', or "
            f"'instruction' and 'output', or 'text'; this one has {has}; names of its own can be "
            "given: --fields prompt=question,completion=answer"
        )
    if len(kinds) > 1:
        raise DataError(
            f"{where}: the record mixes {' with '.join(kinds)}; keep one of them, or say which "
            "fields to pass over: --fields=-NAME"
        )
    return kinds[0]


def string(record: Mapping[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    """The text in a field. DataError where it is missing, empty, no text, or half a character."""
    if field not in record:
        raise DataError(f"{where}: the field {field!r} is missing")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} must be a string, not {type_name(value)}")
    if not (value.strip() or may_be_empty):
        raise DataError(f"{where}: the field {field!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: the field {field!r} has half of a UTF-16 surrogate pair")
    return value


def _no_others(record: Mapping[str, Any], where: str, what: str) -> None:
    for name in _OF_CHAT:
        if name in record and record[name] not in (None, "", [], {}):
            raise DataError(
                f"{where}: the field {name!r} belongs to a conversation, and this record has "
                f"{what}; write it as 'messages', or say that it is to be passed over: "
                f"--fields=-{name}"
            )


# ---- conversations -------------------------------------------------------------------------------


def _conversation(
    record: Mapping[str, Any], where: str, fields: Fields, notes: Notes
) -> Conversation:
    (name, *more) = [n for n in KINDS["messages"] if n in record]
    if more:
        raise DataError(f"{where}: the record has {name!r} and {more[0]!r}; keep one of them")
    messages, trained = messages_of(record[name], name, where, fields, notes)
    if "prompt" in record:
        first = next((m["content"] for m in messages if m["role"] == "user"), None)
        if record["prompt"] != first:
            raise DataError(
                f"{where}: 'prompt' is another text than the first user's message; keep one of "
                "them, or pass it over: --fields=-prompt"
            )
        notes.say("'prompt' repeats the first user's message, and was passed over")
    return with_extras(messages, trained, record, where, notes)


def _two_parts(record: Mapping[str, Any], where: str, fields: Fields, notes: Notes) -> Conversation:
    """TRL's conversational prompt and completion: only the completion's turns are learnt."""
    for name in ("prompt", "completion"):
        if not isinstance(record.get(name), list):
            raise DataError(
                f"{where}: 'prompt' and 'completion' must both be texts, or both be messages; "
                f"{name!r} is {type_name(record.get(name))}"
            )
    before, _ = messages_of(record["prompt"], "prompt", where, fields, notes, learn=False)
    after, trained = messages_of(record["completion"], "completion", where, fields, notes)
    return with_extras(before + after, [False] * len(before) + trained, record, where, notes)


def _instruction(record: Mapping[str, Any], where: str, notes: Notes) -> Conversation:
    """Alpaca's record: LLaMA-Factory's rule, a line break between instruction and input."""
    asked = string(record, "instruction", where)
    more = string(record, "input", where, may_be_empty=True) if record.get("input") else ""
    messages: list[Message] = []
    for i, pair in enumerate(_array(record, "history", where) or []):
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair))):
            raise DataError(f"{where}: history[{i}] must be a pair of texts: [asked, answered]")
        messages += [_turn("user", pair[0]), _turn("assistant", pair[1])]
    messages += [_turn("user", f"{asked}\n{more}" if more else asked)]
    messages += [_turn("assistant", string(record, "output", where))]
    notes.say("Alpaca's instruction and input became the user's turn, output the assistant's")
    trained = [m["role"] == "assistant" for m in messages]
    return with_extras(messages, trained, record, where, notes, "instruction and output")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def with_extras(
    messages: list[Message],
    trained: list[bool],
    record: Mapping[str, Any],
    where: str,
    notes: Notes,
    kind: str = "messages",
) -> Conversation:
    if kind == "messages":
        for name in ("history", "input"):
            if record.get(name):
                raise DataError(
                    f"{where}: the field {name!r} belongs to 'instruction' and 'output', and this "
                    f"record has messages; pass it over with --fields=-{name}"
                )
    if record.get("system"):
        system = string(record, "system", where)
        if not messages or messages[0]["role"] != "system":
            messages, trained = [_turn("system", system), *messages], [False, *trained]
        elif messages[0]["content"] != system:
            raise DataError(f"{where}: 'system' is another text than the system message")
    tools = _array(record, "tools", where)
    old = _array(record, "functions", where)
    if tools and old:
        raise DataError(f"{where}: the record has 'tools' and 'functions'; keep one of them")
    if old:
        tools = [{"type": "function", "function": f} for f in old]
        notes.say("OpenAI's functions became tools")
    for i, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise DataError(f"{where}: tools[{i}] must be an object, not {type_name(tool)}")
    return Conversation(
        messages,
        trained,
        _pruned(tools) or None,
        _array(record, "documents", where) or None,
        _template_args(record, where),
    )


def _array(record: Mapping[str, Any], name: str, where: str) -> list[Any] | None:
    value = record.get(name)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"{where}: the field {name!r}")
    if value in (None, "", {}):
        return None
    if not isinstance(value, list):
        raise DataError(f"{where}: the field {name!r} must be an array, not {type_name(value)}")
    return value


def _template_args(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    value = record.get("chat_template_kwargs")
    if isinstance(value, str) and value.strip():
        value = _json(value, f"{where}: the field 'chat_template_kwargs'")
    if value in (None, "", {}):
        return {}
    if not isinstance(value, dict):
        raise DataError(
            f"{where}: the field 'chat_template_kwargs' must be an object, not {type_name(value)}"
        )
    for name in _RESERVED:
        if name in value:
            raise DataError(f"{where}: chat_template_kwargs must not have {name!r}: pylora sets it")
    return {k: v for k, v in value.items() if v is not None}


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is text that is not JSON: {error}") from None


def _pruned(value: Any) -> Any:
    """Without the nulls that a table puts in where a row has no such field."""
    if isinstance(value, dict):
        return {k: _pruned(v) for k, v in value.items() if v is not None}
    return [_pruned(v) for v in value] if isinstance(value, list) else value


# ---- messages ------------------------------------------------------------------------------------


def messages_of(
    value: Any, name: str, where: str, fields: Fields, notes: Notes, *, learn: bool = True
) -> tuple[list[Message], list[bool]]:
    """Messages as a template takes them, and which are trained.

    With learn=False none is, and it is no error that no assistant's message is among them.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: the field {name!r} must be an array, not {type_name(value)}")
    messages: list[Message] = []
    trained: list[bool] = []
    for i, item in enumerate(value):
        place = f"{where}: {name}[{i}]"
        if not isinstance(item, dict):
            raise DataError(f"{place} must be an object, not {type_name(item)}")
        message, counts = _message(item, place, fields, notes)
        messages.append(message)
        trained.append(counts and learn)
    if learn and not any(m["role"] == "assistant" for m in messages):
        raise DataError(f"{where}: the messages have no assistant turn, so nothing to learn")
    if learn and not any(trained):
        raise DataError(f"{where}: every assistant turn is marked as not to be trained")
    return messages, trained


def _message(
    item: Mapping[str, Any], place: str, fields: Fields, notes: Notes
) -> tuple[Message, bool]:
    raw = {k: v for k, v in item.items() if v is not None and k not in fields.dropped}
    role_key, content_key = fields.names.get("role", "role"), fields.names.get("content", "content")
    if role_key not in raw and "from" in raw:
        role_key, content_key = "from", fields.names.get("content", "value")
        notes.say("ShareGPT's from and value became role and content")
    renamed = {k: v for k, v in raw.items() if k not in (role_key, content_key)}
    if role_key in raw:
        renamed["role"] = raw[role_key]
    if content_key in raw:
        renamed["content"] = raw[content_key]
    check_message(renamed, place)
    given = string(renamed, "role", place)
    if given == "function_call":  # ShareGPT's name of an assistant's turn that calls a tool
        called = _json(string(renamed, "content", place), f"{place}: the content")
        renamed["tool_calls" if isinstance(called, list) else "function_call"] = called
        renamed["role"], renamed["content"] = "assistant", ""
        given = "assistant"
    role = role_of(given, fields, place)
    if role != given:
        notes.say(f"the role {given!r} became {role!r}")
    message: Message = {"role": role, **{k: v for k, v in renamed.items() if k != "role"}}
    calls = _calls(message, place, notes)
    message.pop("function_call", None)
    if calls:
        message["tool_calls"] = calls
        message.setdefault("content", "")
    _check_content(message, role, bool(calls), place)
    return message, _counts(message, role, place)


def _check_content(message: Message, role: str, calls: bool, place: str) -> None:
    content = message.get("content")
    if isinstance(content, list):
        for j, part in enumerate(content):
            part = {"type": "text", "text": part} if isinstance(part, str) else part
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise DataError(
                    f"{place}: part {j} of the content is of type {kind!r}; pylora trains text: "
                    '{"type": "text", "text": "..."}'
                )
            string(part, "text", f"{place}: part {j} of the content", may_be_empty=True)
        joined = "".join(p if isinstance(p, str) else p["text"] for p in content)
        if role == "assistant" and not joined.strip() and not calls:
            raise DataError(f"{place}: the field 'content' is empty")
        return
    string(message, "content", place, may_be_empty=role != "assistant" or calls)


def _counts(message: Message, role: str, place: str) -> bool:
    """Whether a message is trained; its marks are taken out of it."""
    marks = {name: message.pop(name) for name in ("weight", "train") if name in message}
    for name, mark in marks.items():
        allowed = mark in (0, 1) if name == "weight" else isinstance(mark, bool)
        if not allowed:
            raise DataError(
                f"{place}: {name!r} is {mark!r}; "
                + ("it must be 0 or 1" if name == "weight" else "it must be true or false")
            )
        if mark and role != "assistant":
            raise DataError(
                f"{place}: {name!r} asks to train a {role}'s turn; only the assistant's are"
            )
    if len({bool(mark) for mark in marks.values()}) > 1:
        raise DataError(f"{place}: 'weight' and 'train' contradict each other")
    return role == "assistant" and all(bool(mark) for mark in marks.values())


def _calls(message: Message, place: str, notes: Notes) -> list[Any]:
    """The calls of tools, in the form that templates take: arguments as an object."""
    calls = message.get("tool_calls") or []
    old = message.get("function_call")
    if old:
        if calls:
            raise DataError(f"{place}: the message has 'tool_calls' and 'function_call'")
        calls = [{"type": "function", "function": old}]
        notes.say("a function_call became tool_calls")
    if isinstance(calls, str):
        calls = _json(calls, f"{place}: the field 'tool_calls'")
    if not isinstance(calls, list):
        raise DataError(f"{place}: the field 'tool_calls' must be an array, not {type_name(calls)}")
    out = []
    for j, call in enumerate(_pruned(calls)):
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"{place}: tool_calls[{j}] must be an object with a function's name")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{place}: the arguments of tool_calls[{j}]")
        inner = inner | {"arguments": arguments}
        out.append(call | {"function": inner} if "function" in call else inner)
    return out
