"""Records of preferences, as TRL's: two answers to a prompt, or one with a verdict.

    {"prompt": …, "chosen": …, "rejected": …}      texts, or messages
    {"chosen": …, "rejected": …}                   the prompt is what both begin with
    {"prompt": …, "completion": …, "label": true}  for KTO, which takes the others apart, too

Also OpenAI's input, preferred_output and non_preferred_output. A record that cannot be used is a
DataError that names its place; none is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from pylora.errors import DataError
from pylora.training.examples import Tokenizer
from pylora.training.fields import check
from pylora.training.objectives.answers import Answer, Preference, Verdict
from pylora.training.objectives.items import Items, Reader
from pylora.training.reading import type_name
from pylora.training.records import Conversation, Message, Pair, messages_of, string, with_extras

_OURS = ("chosen", "rejected", "label")
_OPENAI = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
_PAIR = "a preference record has 'prompt', 'chosen' and 'rejected' (or 'chosen' and 'rejected')"
_VERDICT = "a record for kto has 'prompt', 'completion' and 'label', or 'chosen' and 'rejected'"
Content = Pair | Conversation


def load_preferences(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    **options: Any,
) -> Items:
    """`Preference`s from a file (or a list of records), in its order; options: `load_examples`'."""
    reader = Reader(path, tokenizer, **options)

    def interpret(record: dict[str, Any], where: str) -> tuple[str, list[Any]]:
        kind, contents = _pair(_known(record, where, reader), where, reader)
        chosen, rejected = (Answer.of(*reader.tokens(c, where), where) for c in contents)
        if chosen.digest == rejected.digest:
            raise DataError(
                f"{where}: 'chosen' and 'rejected' are the same tokens once they are encoded"
                f"{' and cut' if reader.truncated else ''}, so there is nothing to prefer"
            )
        return kind, [Preference(chosen, rejected, where)]

    return reader.read(interpret)


def load_verdicts(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    **options: Any,
) -> Items:
    """`Verdict`s from a file (or a list of records), in its order; options: `load_examples`'. A
    record of two answers becomes two verdicts, as in TRL."""
    reader = Reader(path, tokenizer, **options)
    judged: list[tuple[list[int], list[bool], bool, str]] = []

    def interpret(record: dict[str, Any], where: str) -> tuple[str, list[Any]]:
        record = _known(record, where, reader)
        if "chosen" in record or "rejected" in record:
            kind, contents = _pair(record, where, reader)
            reader.notes.say("chosen became a desirable answer, rejected an undesirable one")
            found = list(zip(contents, (True, False)))
        else:
            kind, content, label = _judged(record, where, reader)
            found = [(content, label)]
        judged.extend((*reader.tokens(c, where), label, where) for c, label in found)
        return kind, [None] * len(found)

    read = reader.read(interpret)
    if len(judged) < 2:
        raise DataError(
            f"{reader.name}: one answer alone; kto compares each with the answer of another record"
        )
    labels = {label for _, _, label, _ in judged}
    notes = list(read.notes)
    if len(labels) == 1:
        kind = "desirable" if labels.pop() else "undesirable"
        notes.append(f"every answer is {kind}; kto learns more from both kinds")
    return Items(_with_others(judged, reader.max_length), read.truncated, notes)


def _with_others(judged: Sequence[Any], max_length: int | None) -> list[Verdict]:
    """Each prompt also with the answer of the record before it; the first with the last's."""
    out = []
    for i, (tokens, counted, label, where) in enumerate(judged):
        other_tokens, other_counted, _, other_where = judged[i - 1]
        prompt, start = counted.index(True), other_counted.index(True)
        mixed = (tokens[:prompt] + other_tokens[start:])[:max_length]
        flags = ([False] * prompt + other_counted[start:])[:max_length]
        place = f"{where} with the answer of {other_where}"
        other = Answer.of(mixed, flags, place)
        out.append(Verdict(Answer.of(tokens, counted, where), other, label, where))
    return out


# ---- one record ----------------------------------------------------------------------------------


def _known(record: dict[str, Any], where: str, reader: Reader) -> dict[str, Any]:
    """The record without nulls, under TRL's names. DataError for a field that means something
    else, or that is misspelt."""
    said = {name: value for name, value in record.items() if value is not None}
    if any(name in said for name in _OPENAI):
        said = _openai(said, where)
        reader.notes.say("OpenAI's preferred_output became chosen, non_preferred_output rejected")
    check({name: value for name, value in said.items() if name not in _OURS}, where)
    return said


def _openai(said: dict[str, Any], where: str) -> dict[str, Any]:
    given = said.pop("input", None)
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise DataError(f"{where}: beside preferred_output, 'input' must have 'messages'")
    for theirs, ours in _OPENAI.items():
        if ours in said:
            raise DataError(f"{where}: the record has {theirs!r} and {ours!r}; keep one of them")
        if theirs in said:
            said[ours] = said.pop(theirs)
    if "prompt" in said:
        raise DataError(f"{where}: the record has 'input' and 'prompt'; keep one of them")
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    return {**said, **tools, "prompt": given["messages"]}


def _pair(record: dict[str, Any], where: str, reader: Reader) -> tuple[str, list[Content]]:
    for name in ("chosen", "rejected"):
        if name not in record:
            has = ", ".join(map(repr, list(record)[:8])) or "no field"
            raise DataError(f"{where}: there is no {name!r} answer; {_PAIR}, this one has {has}")
    for name in ("completion", "label", "messages", "text"):
        if name in record:
            raise DataError(
                f"{where}: the record has 'chosen' and {name!r}; keep one of them, or pass it "
                f"over: --fields=-{name}"
            )
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError(
            f"{where}: 'chosen' and 'rejected' must both be texts, or both be messages; 'rejected' "
            f"is {type_name(rejected)}"
        )
    if chosen == rejected:
        raise DataError(
            f"{where}: 'chosen' and 'rejected' are the same, so there is nothing to prefer; take "
            "the record out"
        )
    if isinstance(chosen, list):
        return "messages", _of_messages(record, where, reader)
    _no_chat(record, where)
    better, worse = string(record, "chosen", where), string(record, "rejected", where)
    if "prompt" in record:
        prompt = _prompt_text(record, where)
        return "texts", [Pair(prompt, better), Pair(prompt, worse)]
    prompt = commonprefix([better, worse])
    if prompt.endswith(" "):  # a space belongs to the answer's first token
        prompt = prompt[:-1]
    if not prompt.strip():
        raise DataError(
            f"{where}: there is no 'prompt', and 'chosen' and 'rejected' do not begin alike"
        )
    answers = better[len(prompt) :], worse[len(prompt) :]
    for name, answer in zip(("chosen", "rejected"), answers):
        if not answer.strip():
            raise DataError(
                f"{where}: {name!r} is only the beginning of the other answer; give the 'prompt' "
                "by itself"
            )
    return "texts without a prompt", [Pair(prompt, answer) for answer in answers]


def _prompt_text(record: Mapping[str, Any], where: str) -> str:
    if isinstance(record["prompt"], list):
        raise DataError(f"{where}: 'prompt' is messages, so the answers must be messages, too")
    return string(record, "prompt", where)


def _no_chat(record: Mapping[str, Any], where: str) -> None:
    for name in ("tools", "functions", "documents", "chat_template_kwargs", "system"):
        if record.get(name) not in (None, "", [], {}):
            raise DataError(
                f"{where}: the field {name!r} belongs to a conversation, and this record has "
                f"texts; write them as messages, or pass it over: --fields=-{name}"
            )


def _of_messages(record: dict[str, Any], where: str, reader: Reader) -> list[Content]:
    answers = [_messages(record, name, where, reader) for name in ("chosen", "rejected")]
    prompt: list[Message] = []
    if isinstance(record.get("prompt"), list):
        prompt = _messages(record, "prompt", where, reader, learn=False)
        answers = [a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in answers]
    elif "prompt" in record:
        asked = {"role": "user", "content": string(record, "prompt", where)}
        if not all(asked in a for a in answers):  # else the answers repeat the prompt
            prompt = [asked]
    if not prompt:
        shared = 0
        while shared < min(map(len, answers)) and answers[0][shared] == answers[1][shared]:
            shared += 1
        prompt, answers = answers[0][:shared], [a[shared:] for a in answers]
    for name, answer in zip(("chosen", "rejected"), answers):
        if not any(message["role"] == "assistant" for message in answer):
            raise DataError(f"{where}: {name!r} has no assistant's turn behind the prompt")
    if not prompt:
        raise DataError(
            f"{where}: there is no 'prompt', and 'chosen' and 'rejected' do not begin alike"
        )
    return [_conversation(prompt, answer, record, where, reader) for answer in answers]


def _messages(
    record: Mapping[str, Any], name: str, where: str, reader: Reader, *, learn: bool = True
) -> list[Message]:
    found, trained = messages_of(
        record[name], name, where, reader.fields, reader.notes, learn=learn
    )
    for message, counts in zip(found, trained):
        if learn and message["role"] == "assistant" and not counts:
            raise DataError(
                f"{where}: {name}: a turn that is not to be trained cannot be preferred"
            )
    return found


def _conversation(
    prompt: list[Message],
    answer: list[Message],
    record: Mapping[str, Any],
    where: str,
    reader: Reader,
) -> Conversation:
    trained = [False] * len(prompt) + [m["role"] == "assistant" for m in answer]
    rest = {k: v for k, v in record.items() if k not in (*_OURS, "prompt", "completion")}
    return with_extras(prompt + answer, trained, rest, where, reader.notes)


def _judged(record: dict[str, Any], where: str, reader: Reader) -> tuple[str, Content, bool]:
    for name in ("prompt", "completion", "label"):
        if name not in record:
            has = ", ".join(map(repr, list(record)[:8])) or "no field"
            raise DataError(f"{where}: there is no {name!r}; {_VERDICT}, this one has {has}")
    label = _label(record["label"], where)
    if isinstance(record["completion"], list):
        answer = _messages(record, "completion", where, reader)
        if isinstance(record["prompt"], list):
            prompt = _messages(record, "prompt", where, reader, learn=False)
        else:
            prompt = [{"role": "user", "content": string(record, "prompt", where)}]
        return "messages", _conversation(prompt, answer, record, where, reader), label
    _no_chat(record, where)
    prompt_text = _prompt_text(record, where)
    return "texts", Pair(prompt_text, string(record, "completion", where)), label


def _label(value: Any, where: str) -> bool:
    said = value.strip().lower() if isinstance(value, str) else value  # a table's cells are texts
    known = {"true": True, "false": False, "1": True, "0": False}
    if isinstance(said, str) and said in known:
        return known[said]
    if isinstance(said, bool) or said in (0, 1):
        return bool(said)
    raise DataError(f"{where}: 'label' is {value!r:.40}; it must be true (desirable) or false")
