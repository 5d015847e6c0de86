"""Texts with a class or a number: records of a file, and what a run trains on.

    {"text": "…", "label": 2}     {"text": "…", "label": "positive"}     {"text": "…", "label": 0.7}

`messages` in place of `text` go through the model's chat template. What the classes are is what the
training file has, or what the caller says; a label that is none of them is a DataError with its
place.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError, DataError
from pylora.training.examples import Tokenizer
from pylora.training.fields import check
from pylora.training.objectives.items import Items, Reader
from pylora.training.reading import type_name
from pylora.training.records import messages_of, string
from pylora.types import brief

_RECORD = "a record has 'text' and 'label'"


@dataclass(frozen=True, eq=False)
class Labelled:
    """A text and what it is: the number of its class, or a number."""

    __repr__ = brief

    ids: np.ndarray  # int64 [n]
    label: float
    where: str = "text"

    def __len__(self) -> int:
        return int(self.ids.size)


class LabelledItems(Items):
    """The texts of a file; `classes` has the classes' names in order (none: numbers)."""

    classes: tuple[str, ...] = ()


def digest(items: Sequence[Labelled]) -> str:
    """sha256 (hex) of tokens and labels, in order."""
    h = hashlib.sha256()
    for item in items:
        h.update(np.ascontiguousarray(item.ids, "<i8").tobytes())
        h.update(f"{len(item)} {float(item.label).hex()} ".encode())
    return h.hexdigest()


def load_classes(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    classes: str | Sequence[str] | None = None,
    **options: Any,
) -> LabelledItems:
    """Texts with classes; options: `load_examples`'.

    classes: how many there are ("5"), or their names in order ("no,yes", or a list). Without it
    they are what the file has: names in the order of the alphabet, or 0 up to the highest number,
    of which none may be missing.
    """
    known = _parse(classes)
    texts, labels, wheres, reader, read = _texts(path, tokenizer, options)
    named = [isinstance(label, str) and not label.strip().isdecimal() for label in labels]
    if len({isinstance(label, str) for label in labels}) == 2 and any(named):
        at = wheres[named.index(True)]
        raise DataError(f"{at}: this label is a name, others of the file are numbers")
    if not known:
        known = _found(labels, wheres, reader.name)
    numbers = [_class(label, known, where) for label, where in zip(labels, wheres)]
    made = [Labelled(t, float(n), w) for t, n, w in zip(texts, numbers, wheres)]
    out = LabelledItems(made, read.truncated, read.notes)
    out.classes = known
    return out


def load_numbers(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    **options: Any,
) -> LabelledItems:
    """Texts with numbers; options: `load_examples`'."""
    texts, labels, wheres, _, read = _texts(path, tokenizer, options)
    made = [Labelled(t, _number(label, w), w) for t, label, w in zip(texts, labels, wheres)]
    return LabelledItems(made, read.truncated, read.notes)


def _texts(path: Any, tokenizer: Tokenizer, options: Mapping[str, Any]) -> tuple[Any, ...]:
    reader = Reader(path, tokenizer, **options)
    labels: list[Any] = []
    wheres: list[str] = []

    def interpret(record: dict[str, Any], where: str) -> tuple[str, list[Any]]:
        said = {name: value for name, value in record.items() if value is not None}
        for name in ("prompt", "completion", "chosen", "rejected"):
            if name in said:
                raise DataError(
                    f"{where}: {_RECORD}, this one has {name!r}; say what it is, such as "
                    f"--fields text={name}, or pass it over: --fields=-{name}"
                )
        check({name: value for name, value in said.items() if name != "label"}, where)
        if "label" not in said:
            has = ", ".join(map(repr, list(said)[:8])) or "no field"
            raise DataError(f"{where}: there is no 'label'; {_RECORD}, this one has {has}")
        labels.append(said["label"])
        wheres.append(where)
        return _tokens(said, where, reader)

    read = reader.read(interpret)
    return list(read), labels, wheres, reader, read


def _tokens(said: dict[str, Any], where: str, reader: Reader) -> tuple[str, list[Any]]:
    tokenizer: Any = reader.tokenizer
    if "messages" in said and "text" in said:
        raise DataError(f"{where}: the record has 'messages' and 'text'; keep one of them")
    if "messages" in said:
        messages, _ = messages_of(
            said["messages"], "messages", where, reader.fields, reader.notes, learn=False
        )
        kind = "messages"
        ids = tokenizer.encode_chat(
            tokenizer.render(messages, arguments=dict(reader.template_args)).text
        )
    else:
        kind, text = "text", string(said, "text", where)
        ids = tokenizer.encode(text, bos=tokenizer.add_bos)
    if not ids:
        raise DataError(f"{where}: the text has no token")
    if reader.max_length is not None and len(ids) > reader.max_length:
        if reader.too_long == "error":
            raise DataError(
                f"{where}: the record has {len(ids)} tokens, more than max_length "
                f"{reader.max_length}; raise max_length, shorten the record, or truncate"
            )
        ids = ids[: reader.max_length]
        reader.truncated += 1
    return kind, [np.asarray(ids, np.int64)]


# ---- labels --------------------------------------------------------------------------------------


def _parse(classes: Any) -> tuple[str, ...]:
    """The names that the caller gives; () for none."""
    if classes is None:
        return ()
    if isinstance(classes, str):
        if classes.strip().isdecimal():
            n = int(classes)
            if not 2 <= n <= 100_000:
                raise ConfigError(f"classes is {n}; there must be 2 at least, and 100000 at most")
            return tuple(str(i) for i in range(n))
        classes = [name.strip() for name in classes.split(",")]
    names = tuple(classes)
    if len(names) < 2 or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(
            f"classes is {classes!r:.80}; give how many there are, such as 5, or names: no,yes"
        )
    if len(set(names)) != len(names):
        raise ConfigError(f"classes names {next(n for n in names if names.count(n) > 1)!r} twice")
    return names


def _found(labels: Sequence[Any], wheres: Sequence[str], name: str) -> tuple[str, ...]:
    """The classes of a file that says nothing else."""
    if isinstance(labels[0], str) and not all(label.strip().isdecimal() for label in labels):
        names = tuple(sorted(set(labels)))
    else:
        numbers = [_whole(label, where) for label, where in zip(labels, wheres)]
        highest = max(numbers)
        if highest >= 10 * len(numbers) or set(range(highest + 1)) - set(numbers):
            missing = next(i for i in range(highest + 1) if i not in set(numbers))
            raise DataError(
                f"{wheres[numbers.index(highest)]}: 'label' is {highest}, but no record has class "
                f"{missing}; say how many classes there are: --classes {highest + 1}"
            )
        names = tuple(str(i) for i in range(highest + 1))
    if len(names) < 2:
        raise DataError(
            f"{name}: every record is of class {names[0]!r}; there must be two at least"
        )
    return names


def _whole(label: Any, where: str) -> int:
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if isinstance(label, bool):
        label = int(label)
    if not isinstance(label, int) or label < 0:
        raise DataError(
            f"{where}: 'label' is {label!r:.40}; a class is a whole number from 0, or a name"
        )
    return label


def _class(label: Any, known: tuple[str, ...], where: str) -> int:
    """The number of a label's class: by its name, or by its number."""
    if isinstance(label, str) and label in known:
        return known.index(label)
    if isinstance(label, str) and not label.strip().isdecimal():
        raise DataError(
            f"{where}: 'label' is {label!r:.40}, which is no class; they are "
            f"{', '.join(map(repr, known[:8]))}{' ...' if len(known) > 8 else ''}"
        )
    number = _whole(label, where)
    if number >= len(known):
        raise DataError(
            f"{where}: 'label' is {number}, out of range: there are {len(known)} classes, "
            f"0 to {len(known) - 1}"
        )
    return number


def _number(label: Any, where: str) -> float:
    value = label
    if isinstance(label, str):  # a table's cells are texts
        try:
            value = float(label)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        said = type_name(label) if isinstance(label, (list, dict)) else f"{label!r:.40}"
        raise DataError(f"{where}: 'label' is {said}; it must be a number")
    return float(value)
