"""Training examples: records become token ids, and a label for each token to be predicted.

What a record may be is in records.py, in which forms of file in reading.py. The loss is on the
completion and the end-of-sequence token; on the assistant's turns of a conversation; or on every
token of a text and its end. One kind of record a file. Prompt and completion, and the turns of a
conversation, are encoded as one text, as a server does it. A sequence starts with the
begin-of-sequence token if the tokenizer says so (in a chat: if the template says so). Nothing is
skipped or shortened silently: a record that cannot be used is a DataError that names its place, and
what was converted is in `Examples.notes`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, overload

import numpy as np

from pylora.errors import ConfigError, DataError, WrongTypeError, describe, expect
from pylora.model.config import LlamaConfig
from pylora.reference import IGNORE
from pylora.training.fields import Fields
from pylora.training.reading import read_records
from pylora.training.records import Conversation, Notes, Pair, Text, interpret

T = TypeVar("T")


class Pieces(Protocol):
    """What a tokenizer makes of a conversation: pylora.text.conversation.Conversation is one."""

    @property
    def pieces(self) -> Sequence[Any]: ...  # each with `ids` and `trained`
    @property
    def hidden(self) -> int: ...
    @property
    def rewritten(self) -> bool: ...


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; pylora.text.tokenizer.Tokenizer is one."""

    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def add_bos(self) -> bool: ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...

    def encode_pair(
        self, prompt: str, rest: str, *, bos: bool = False
    ) -> tuple[list[int], int]: ...

    def conversation(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        trained: Sequence[bool] | None = None,
        **options: Any,
    ) -> Pieces: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence. Row i sees ids[:i + 1] and must predict labels[i] (IGNORE = -100: no loss)."""

    ids: np.ndarray  # int64 [n]
    labels: np.ndarray  # int64 [n], already shifted
    where: str = "example"  # where it came from, for error messages

    @classmethod
    def of(cls, tokens: Sequence[int], counted: Sequence[bool], where: str = "example") -> Example:
        """From n + 1 tokens; counted[t] says whether predicting tokens[t] counts in the loss.

        The first token is predicted by nothing; tokens behind the last one that counts are left
        out, as nothing depends on them. DataError where no token is left to predict.
        """
        t, c = np.asarray(tokens, np.int64).reshape(-1), np.asarray(counted, bool).reshape(-1)
        if t.shape != c.shape:
            raise DataError(f"{where}: {t.size} tokens but {c.size} flags of which count")
        if not c[1:].any():
            raise DataError(f"{where}: there is no token to learn after the first one")
        end = int(np.flatnonzero(c)[-1])
        return cls(t[:end].copy(), np.where(c[1 : end + 1], t[1 : end + 1], IGNORE), where)

    def __len__(self) -> int:
        return int(self.ids.size)

    def __repr__(self) -> str:
        return f"Example({self.where}: {len(self)} tokens, {self.label_count} of them to learn)"

    @property
    def label_count(self) -> int:
        return int((self.labels != IGNORE).sum())


class Examples(Sequence[Example]):
    """The examples of a file in its order; how many of them were cut to max_length; and sentences
    about what was converted or split, which a program shows its user."""

    def __init__(
        self, examples: Sequence[Example], truncated: int = 0, notes: Sequence[str] = ()
    ) -> None:
        self._examples, self.truncated, self.notes = tuple(examples), truncated, tuple(notes)

    def __len__(self) -> int:
        return len(self._examples)

    def __repr__(self) -> str:
        cut = f", {self.truncated} of them cut" if self.truncated else ""
        tokens = sum(map(len, self._examples))
        return f"Examples({len(self)}{cut}, {tokens:,} tokens)"

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


def check_examples(
    examples: Sequence[Example], config: LlamaConfig, what: str, max_tokens: int | None = None
) -> None:
    """DataError for an example that a model of this configuration cannot take.

    `what` names the set ("training"); max_tokens limits one example, as batches of that size do.
    """
    if not examples:
        raise DataError(f"there are no {what} examples")
    for example in examples:
        where, n = example.where, len(example)
        if example.labels.shape != example.ids.shape or example.ids.ndim != 1 or n == 0:
            raise DataError(f"{where}: ids and labels must be vectors of one length, not empty")
        labels = example.labels[example.labels != IGNORE]
        if labels.size == 0:
            raise DataError(f"{where}: no label counts, so there is nothing to learn")
        for name, tokens in (("token", example.ids), ("label", labels)):
            bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
            if bad.size:
                raise DataError(
                    f"{where}: {name} {bad[0]} is outside the model's vocabulary of "
                    f"{config.vocab_size}; was another model's tokenizer used?"
                )
        if n > config.max_position_embeddings:
            raise DataError(
                f"{where}: {n} tokens, more than the {config.max_position_embeddings} positions "
                "that the model has; set max_length"
            )
        if max_tokens is not None and n > max_tokens:
            raise DataError(
                f"{where}: {n} tokens, more than max_tokens {max_tokens}; raise max_tokens"
            )


def load_examples(
    path: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    max_length: int | None = None,
    too_long: str = "error",
    fields: str | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Examples:
    """Reads a file of records of one kind (see the top of this file), or a list of records.

    max_length: the most tokens an example may have, end-of-sequence included. A longer one is a
    DataError, or with too_long="truncate" it is cut at its end and counted in `.truncated`.
    fields: names that the file has for pylora's fields, and fields to pass over, such as
    "prompt=question,completion=answer,-label". template_args: variables of the chat template for
    every record, such as {"enable_thinking": False}, over the tokenizer's own `arguments`; a
    record's chat_template_kwargs come first. Raises DataError naming file and line for anything
    that is not a usable record.
    """
    check_options(tokenizer, max_length, too_long, template_args)
    name, records = source(path)
    if not tokenizer.eos_ids:
        raise DataError(no_end(name))
    named, notes = Fields.parse(fields), Notes()
    examples: list[Example] = []
    truncated = 0
    read = ((where, *interpret(record, where, named, notes)) for where, record in records)
    for where, content in of_one_kind(read):
        for tokens, counted in encoded(content, tokenizer, template_args or {}, where, notes):
            if max_length is not None and len(tokens) > max_length:
                tokens, counted = cut(tokens, counted, max_length, too_long, where)
                truncated += 1
            examples.append(Example.of(tokens, counted, where))
    if not examples:
        raise DataError(f"{name}: the file has no records")
    return Examples(examples, truncated, notes.lines())


def of_one_kind(records: Iterable[tuple[str, str, T]]) -> Iterator[tuple[str, T]]:
    """(where, content) of each (where, kind, content); DataError where a second kind begins."""
    first = first_where = ""
    for where, kind, content in records:
        if not first:
            first, first_where = kind, where
        elif kind != first:
            raise DataError(
                f"{where}: this record has {kind}, but the one at {first_where} has {first}; "
                "keep one kind of record per file"
            )
        yield where, content


def no_end(name: str) -> str:
    return (
        f"{name}: the tokenizer names no end-of-sequence token, "
        "so the model could not learn where to stop"
    )


def check_options(
    tokenizer: Tokenizer,
    max_length: int | None,
    too_long: str,
    template_args: Mapping[str, Any] | None,
) -> None:
    """ConfigError or WrongTypeError for what `load_examples` cannot take."""
    if too_long not in ("error", "truncate"):
        raise ConfigError(f"too_long is {too_long!r}; it must be 'error' or 'truncate'")
    whole = isinstance(max_length, (int, np.integer)) and not isinstance(max_length, bool)
    if max_length is not None and not whole:
        raise WrongTypeError(f"max_length is a number of tokens, not {describe(max_length)}")
    if not isinstance(template_args, (Mapping, type(None))):
        raise WrongTypeError(
            "template_args takes a dict such as {'enable_thinking': False}, not "
            f"{describe(template_args)}"
        )
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a record needs at least 2 tokens")
    expect("tokenizer", tokenizer, "load_examples(path, tokenizer)")


def source(data: Any) -> tuple[str, Iterable[tuple[str, dict[str, Any]]]]:
    """What errors call the data, and its records, each with its place: a file's, or a list's."""
    if isinstance(data, (str, os.PathLike)):
        return os.fspath(data), read_records(data)
    if not isinstance(data, Sequence) or isinstance(data, bytes):
        raise WrongTypeError(
            f"the data are the path of a JSONL file or a list of records, not {describe(data)}"
        )
    for i, record in enumerate(data):
        if not isinstance(record, Mapping):
            raise WrongTypeError(
                f"data[{i}] is {describe(record)}; a record is a dict with 'prompt' and "
                "'completion', with 'messages', or with 'text'"
            )
        odd = [name for name in record if not isinstance(name, str)]
        if odd:
            raise WrongTypeError(f"data[{i}]: a field's name is {describe(odd[0])}, not a text")
    return "data", ((f"data[{i}]", dict(record)) for i, record in enumerate(data))


Encoded = tuple[list[int], list[bool]]  # tokens, and which of them count in the loss


def cut(
    tokens: list[int], counted: list[bool], max_length: int, too_long: str, where: str
) -> Encoded:
    if too_long == "error":
        raise DataError(
            f"{where}: the record has {len(tokens)} tokens, more than max_length "
            f"{max_length}; raise max_length, shorten the record, or truncate"
        )
    tokens, counted = tokens[:max_length], counted[:max_length]
    if not any(counted[1:]):
        raise DataError(
            f"{where}: cut to max_length {max_length} tokens, the record has nothing "
            "left to learn; raise max_length or shorten its prompt"
        )
    return tokens, counted


def encoded(
    content: Text | Pair | Conversation,
    tokenizer: Tokenizer,
    template_args: Mapping[str, Any],
    where: str,
    notes: Notes,
) -> list[Encoded]:
    if isinstance(content, Text):
        return [closed(tokenizer.encode(content.text, bos=tokenizer.add_bos), 0, tokenizer)]
    if isinstance(content, Pair):
        bos = tokenizer.add_bos
        return [
            closed(*tokenizer.encode_pair(content.prompt, content.completion, bos=bos), tokenizer)
        ]
    options: dict[str, Any] = {}
    if content.tools:
        options["tools"] = content.tools
    if content.documents:
        options["documents"] = content.documents
    if template_args or content.template_args:
        options["arguments"] = {**template_args, **content.template_args}
    try:
        made = tokenizer.conversation(content.messages, trained=content.trained, **options)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if made.rewritten:
        notes.say(
            "the template shows earlier turns otherwise once later ones follow, so that the "
            "conversation became an example for each turn, as it was shown then"
        )
    if made.hidden:
        notes.say("a turn's thinking is not shown by the template, and is not learnt")
    return [(list(piece.ids), list(piece.trained)) for piece in made.pieces]


def closed(tokens: list[int], prompt: int, tokenizer: Tokenizer) -> Encoded:
    """With the end-of-sequence token at the end, unless one is there. The prompt does not count."""
    if not tokens or tokens[-1] not in tokenizer.eos_ids:
        tokens = [*tokens, tokenizer.eos_ids[0]]
    return tokens, [i >= prompt for i in range(len(tokens))]
