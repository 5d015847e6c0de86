"""The records of a file as an objective takes them, with what was said and counted while reading;
and the loop over a file's records that the objectives' readers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pylora.errors import DataError
from pylora.training.examples import (
    Encoded,
    Tokenizer,
    check_options,
    cut,
    encoded,
    no_end,
    of_one_kind,
    source,
)
from pylora.training.fields import Fields
from pylora.training.records import Conversation, Notes, Pair, Text


class Items(Sequence[Any]):
    """The items of a file in its order; how many answers were cut to max_length; and sentences
    about what was converted, which a program shows its user."""

    def __init__(self, items: Sequence[Any], truncated: int = 0, notes: Sequence[str] = ()) -> None:
        self._items, self.truncated, self.notes = tuple(items), truncated, tuple(notes)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        kind = type(self._items[0]).__name__ if self._items else "nothing"
        return f"Items({len(self)} x {kind}, {sum(map(len, self._items)):,} tokens)"

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Items(self._items[index])
        return self._items[index]


class Reader:
    """Reads a file of records, one at a time, and makes tokens of their texts."""

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        too_long: str = "error",
        fields: str | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        """As `load_examples`, whose errors these are."""
        check_options(tokenizer, max_length, too_long, template_args)
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.template_args = template_args or {}
        self.fields, self.notes = Fields.parse(fields), Notes()
        self.name, self.records = source(path)
        if not tokenizer.eos_ids:
            raise DataError(no_end(self.name))
        self.truncated = 0

    def read(self, interpret: Callable[[dict[str, Any], str], tuple[str, list[Any]]]) -> Items:
        """`interpret(record, where)` gives the record's kind and its items; one kind a file."""
        read = (
            (where, *interpret(self.fields.rename(record, where), where))
            for where, record in self.records
        )
        items = [item for _, some in of_one_kind(read) for item in some]
        if not items:
            raise DataError(f"{self.name}: the file has no records")
        return Items(items, self.truncated, self.notes.lines())

    def tokens(self, content: Text | Pair | Conversation, where: str) -> Encoded:
        """The tokens of one text and which of them count, cut to max_length where that is asked
        for. DataError where a template would make several texts of it."""
        found = encoded(content, self.tokenizer, self.template_args, where, self.notes)
        if len(found) > 1:
            raise DataError(
                f"{where}: the chat template shows earlier turns otherwise once later ones follow, "
                "so an answer of several turns is not one text; give answers of one turn each"
            )
        tokens, counted = found[0]
        if self.max_length is not None and len(tokens) > self.max_length:
            tokens, counted = cut(tokens, counted, self.max_length, self.too_long, where)
            self.truncated += 1
        return tokens, counted
