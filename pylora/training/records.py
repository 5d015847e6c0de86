"""Reads JSONL records for training and checks what is in them; knows no tokenizer.

Every error is a DataError that begins with the file and the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from pylora.errors import DataError

KINDS: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
_MAX_LINE = 64 * 2**20  # bytes; a longer line is not a record but a file of another format


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
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
        raise DataError(f"{where}: a record must be a JSON object, not {type_name(record)}")
    return record


def kind_of(record: dict[str, Any], where: str) -> str:
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


def string(record: dict[str, Any], field: str, where: str, may_be_empty: bool = False) -> str:
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


def type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise DataError(f"{where}: the field 'messages' must be an array, not {type_name(value)}")
    for i, message in enumerate(value):
        place = f"{where}: messages[{i}]"
        if not isinstance(message, dict):
            raise DataError(f"{place} must be an object, not {type_name(message)}")
        string(message, "role", place)
        string(message, "content", place, may_be_empty=message["role"] != "assistant")
    roles = [message["role"] for message in value]
    if "assistant" not in roles:
        raise DataError(f"{where}: the messages have no assistant turn, so nothing to learn")
    if roles[0] == "assistant":
        raise DataError(f"{where}: the first message is the assistant's, with nothing to answer")
    return value
