"""Training records: JSONL files become token ids, and a label for each token to be predicted.

Three kinds of record, one kind per file, one record per line:

    {"prompt": "...", "completion": "..."}     loss on the completion and the end-of-sequence token
    {"messages": [{"role": ..., "content": ...}, ...]}   chat template; loss on assistant turns
    {"text": "..."}                            loss on every token and the end-of-sequence token

Prompt and completion are encoded apart, as they are when a prompt is continued by generation; so
are the turns of a chat. Fields of other names are left alone. Nothing is skipped or shortened
silently: a record that cannot be used is a DataError that names the file and the line.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from pylora.errors import ConfigError, DataError
from pylora.reference import IGNORE

KINDS: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_MAX_LINE = 64 * 2**20  # bytes; a longer line is not a record but a file of another format


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; pylora.formats.text.Tokenizer is one."""

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]: ...

    def apply_chat(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False
    ) -> str: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence. Row i sees ids[:i + 1] and must predict labels[i] (IGNORE = -100: no loss)."""

    ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], already shifted
    where: str = "example"  # where it came from, for error messages

    @classmethod
    def of(cls, tokens: Sequence[int], counted: Sequence[bool], where: str = "example") -> Example:
        """From n + 1 tokens; counted[t] says whether predicting tokens[t] counts in the loss.

        The first token is predicted by nothing. DataError where no token is left to predict.
        """
        t, c = np.asarray(tokens, np.int64).reshape(-1), np.asarray(counted, bool).reshape(-1)
        if t.shape != c.shape:
            raise DataError(f"{where}: {t.size} tokens but {c.size} flags of which count")
        if not c[1:].any():
            raise DataError(f"{where}: there is no token to learn after the first one")
        return cls(t[:-1].copy(), np.where(c[1:], t[1:], IGNORE), where)

    def __len__(self) -> int:
        return int(self.ids.size)

    @property
    def label_count(self) -> int:
        return int((self.labels != IGNORE).sum())


class Examples(Sequence[Example]):
    """The examples of a file in its order, and how many of them were cut to max_length."""

    def __init__(self, examples: Sequence[Example], truncated: int = 0) -> None:
        self._examples, self.truncated = tuple(examples), truncated

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._examples[index])
        return self._examples[index]


def digest(examples: Sequence[Example]) -> str:
    """sha256 (hex) of the ids and labels, in order; where they came from does not count."""
    h = hashlib.sha256()
    for example in examples:
        h.update(len(example).to_bytes(8, "little"))
        h.update(np.ascontiguousarray(example.ids, "<i8").tobytes())
        h.update(np.ascontiguousarray(example.labels, "<i8").tobytes())
    return h.hexdigest()


def load_examples(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    too_long: str = "error",
) -> Examples:
    """Reads a JSONL file of one kind of record (see the top of this file).

    max_length: the most tokens a record may have, end-of-sequence included. A longer record is a
    DataError, or with too_long="truncate" it is cut at its end and counted in `.truncated`.
    Raises DataError naming file and line for anything that is not a usable record.
    """
    if too_long not in ("error", "truncate"):
        raise ConfigError(f"too_long is {too_long!r}; it must be 'error' or 'truncate'")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a record needs at least 2 tokens")
    if not tokenizer.eos_ids:
        raise DataError(
            f"{os.fspath(path)}: the tokenizer names no end-of-sequence token, "
            "so the model could not learn where to stop"
        )
    examples: list[Example] = []
    truncated, first = 0, ""
    for where, record in _records(path):
        kind = _kind(record, where)
        if not first:
            first, first_where = kind, where
        elif kind != first:
            raise DataError(
                f"{where}: this record has {kind}, but the one at {first_where} has {first}; "
                "keep one kind of record per file"
            )
        tokens, counted = _ENCODERS[kind](record, tokenizer, where)
        if max_length is not None and len(tokens) > max_length:
            if too_long == "error":
                raise DataError(
                    f"{where}: the record has {len(tokens)} tokens, more than max_length "
                    f"{max_length}; raise max_length, shorten the record, or truncate"
                )
            tokens, counted = tokens[:max_length], counted[:max_length]
            truncated += 1
            if not any(counted[1:]):
                raise DataError(
                    f"{where}: cut to max_length {max_length} tokens, the record has nothing "
                    "left to learn; raise max_length or shorten its prompt"
                )
        examples.append(Example.of(tokens, counted, where))
    if not examples:
        raise DataError(f"{os.fspath(path)}: the file has no records")
    return Examples(examples, truncated)


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank."""
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE + 1):
                number += 1
                where = f"{name}:{number}"
                if len(line) > _MAX_LINE:
                    raise DataError(f"{where}: the line is longer than {_MAX_LINE} bytes")
                if line.strip():
                    yield where, _parse(line, where)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise DataError(f"{where}: a field occurs twice in one JSON object")
        return record

    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not a usable JSON value: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {_type(record)}")
    return record


def _kind(record: dict[str, Any], where: str) -> str:
    kinds = [kind for kind, fields in KINDS.items() if any(f in record for f in fields)]
    if not kinds:
        has = ", ".join(repr(name) for name in list(record)[:8]) or "no field"
        raise DataError(
            f"{where}: a record must have 'prompt' and 'completion', or 'messages', or 'text'; "
            f"this one has {has}"
        )
    if len(kinds) > 1:
        raise DataError(f"{where}: the record mixes {' with '.join(kinds)}; keep one of them")
    return kinds[0]


def _string(record: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
    if field not in record:
        raise DataError(f"{where}: the field {field!r} is missing")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} must be a string, not {_type(value)}")
    if not (value.strip() or may_be_empty):
        raise DataError(f"{where}: the field {field!r} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: the field {field!r} has half of a UTF-16 surrogate pair")
    return value


def _type(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


Encoded = tuple[list[int], list[bool]]  # tokens, and which of them count in the loss


def _closed(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the end-of-sequence token at the end, unless one is there."""
    done = bool(tokens) and tokens[-1] in tokenizer.eos_ids
    return tokens if done else [*tokens, tokenizer.eos_ids[0]]


def _encode_pair(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    prompt = tokenizer.encode(_string(record, "prompt", where))
    completion = _closed(tokenizer.encode(_string(record, "completion", where)), tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _encode_text(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    tokens = _closed(tokenizer.encode(_string(record, "text", where)), tokenizer)
    return tokens, [True] * len(tokens)


def _encode_messages(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    """Renders the chat up to each assistant turn and up to its end: the difference is the turn."""
    messages = _messages(record["messages"], where)
    tokens: list[int] = []
    counted: list[bool] = []
    done = ""  # the text that `tokens` stand for

    def take(text: str, count: bool) -> bool:
        """Adds what `text` has beyond `done`; returns whether an end-of-sequence token is in it."""
        nonlocal done
        if not text.startswith(done):
            raise DataError(
                f"{where}: the chat template changes earlier turns when later ones follow, so "
                "the assistant's tokens cannot be told apart; give prompt and completion instead"
            )
        piece = tokenizer.encode(text[len(done) :]) if len(text) > len(done) else []
        # What a template puts behind the end of a turn, such as a line break, is not generated.
        ends = [i for i, token in enumerate(piece) if token in tokenizer.eos_ids]
        last = ends[-1] if ends else len(piece)
        tokens.extend(piece)
        counted.extend(count and i <= last for i in range(len(piece)))
        done = text
        return bool(ends)

    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            take(tokenizer.apply_chat(messages[:i], add_generation_prompt=True), False)
            closed = take(tokenizer.apply_chat(messages[: i + 1]), True)
            if i + 1 == len(messages) and not closed:  # a template that leaves the last turn open
                tokens.append(tokenizer.eos_ids[0])
                counted.append(True)
    return tokens, counted


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: the field 'messages' must be an array, not {_type(value)}")
    for i, message in enumerate(value):
        place = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise DataError(f"{place} must be an object, not {_type(message)}")
        _string(message, "role", place)
        _string(message, "content", place, may_be_empty=message["role"] != "assistant")
    roles = [message["role"] for message in value]
    if "assistant" not in roles:
        raise DataError(f"{where}: the messages have no assistant turn, so nothing to learn")
    if roles[0] == "assistant":
        raise DataError(f"{where}: the first message is the assistant's, with nothing to answer")
    return value


_ENCODERS = {
    "prompt and completion": _encode_pair,
    "messages": _encode_messages,
    "text": _encode_text,
}
