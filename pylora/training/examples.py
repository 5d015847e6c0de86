"""Training records: JSONL files become token ids, and a label for each token to be predicted.

Three kinds of record, one kind per file, one record per line:

    {"prompt": "...", "completion": "..."}     loss on the completion and the end-of-sequence token
    {"messages": [{"role": ..., "content": ...}, ...]}   chat template; loss on assistant turns
    {"text": "..."}                            loss on every token and the end-of-sequence token

Prompt and completion are encoded apart, as they are when a prompt is continued by generation; so
are the turns of a chat. A sequence starts with the begin-of-sequence token if the tokenizer says so
(in a chat: if the template says so). Fields of other names are left alone. Nothing is skipped or
shortened silently: a record that cannot be used is a DataError that names the file and the line.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np

from pylora.errors import ConfigError, DataError, WrongTypeError, describe, expect
from pylora.model.config import LlamaConfig
from pylora.reference import IGNORE
from pylora.training.records import kind_of, messages_of, read_records, string


class Tokenizer(Protocol):
    """What this module asks of a tokenizer; pylora.text.tokenizer.Tokenizer is one."""

    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def add_bos(self) -> bool: ...

    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
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
    """The examples of a file in its order, and how many of them were cut to max_length."""

    def __init__(self, examples: Sequence[Example], truncated: int = 0) -> None:
        self._examples, self.truncated = tuple(examples), truncated

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
) -> Examples:
    """Reads a JSONL file of one kind of record (see the top of this file), or a list of records.

    max_length: the most tokens a record may have, end-of-sequence included. A longer record is a
    DataError, or with too_long="truncate" it is cut at its end and counted in `.truncated`.
    Raises DataError naming file and line for anything that is not a usable record.
    """
    if too_long not in ("error", "truncate"):
        raise ConfigError(f"too_long is {too_long!r}; it must be 'error' or 'truncate'")
    if max_length is not None and max_length < 2:
        raise ConfigError(f"max_length is {max_length}; a record needs at least 2 tokens")
    expect("tokenizer", tokenizer, "load_examples(path, tokenizer)")
    name, records = _source(path)
    if not tokenizer.eos_ids:
        raise DataError(
            f"{name}: the tokenizer names no end-of-sequence token, "
            "so the model could not learn where to stop"
        )
    examples: list[Example] = []
    truncated, first = 0, ""
    for where, record in records:
        kind = kind_of(record, where)
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
        raise DataError(f"{name}: the file has no records")
    return Examples(examples, truncated)


def _source(data: Any) -> tuple[str, Iterable[tuple[str, dict[str, Any]]]]:
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
    return "data", ((f"data[{i}]", dict(record)) for i, record in enumerate(data))


Encoded = tuple[list[int], list[bool]]  # tokens, and which of them count in the loss


def _closed(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """With the end-of-sequence token at the end, unless one is there."""
    done = bool(tokens) and tokens[-1] in tokenizer.eos_ids
    return tokens if done else [*tokens, tokenizer.eos_ids[0]]


def _encode_pair(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    prompt = tokenizer.encode(string(record, "prompt", where), bos=tokenizer.add_bos)
    completion = _closed(tokenizer.encode(string(record, "completion", where)), tokenizer)
    return prompt + completion, [False] * len(prompt) + [True] * len(completion)


def _encode_text(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    text = string(record, "text", where)
    tokens = _closed(tokenizer.encode(text, bos=tokenizer.add_bos), tokenizer)
    return tokens, [True] * len(tokens)


def _encode_messages(record: dict[str, Any], tokenizer: Tokenizer, where: str) -> Encoded:
    """Renders the chat up to each assistant turn and up to its end: the difference is the turn."""
    messages = messages_of(record["messages"], where)
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


_ENCODERS = {
    "prompt and completion": _encode_pair,
    "messages": _encode_messages,
    "text": _encode_text,
}
