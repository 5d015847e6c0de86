"""Weights that an adapter brings along whole, and the model that has them in place of its own.

PEFT's modules_to_save, its trainable_token_indices and the tables of a resized vocabulary all come
to the same: some tensors of the base model are others. The model that has them is in with_whole.py,
their training in trained.py; reading and beginning them is in adapters/whole.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import PlanError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.types import Array, brief


@dataclass(frozen=True, eq=False)
class Whole:
    """Tensors of the model by name, shaped as `LlamaConfig.tensors()` says, float32."""

    __repr__ = brief

    tensors: Mapping[str, Array]
    # Of tables of which single rows were trained (trainable_token_indices): which rows.
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    vocab: int | None = None  # rows of embedding and head, where they are not the base's
    tied: bool = True  # whether a head that is the base's embedding is the new one, too
    was_tied: bool = False  # whether the base's head is its embedding
    twin: tuple[str, str] | None = None  # (embedding, tied head): files have the first twice
    turned: frozenset[str] = frozenset()  # tensors that files have [inputs, outputs]
    # What is trained further, by tensor name: the tensor itself; of `rows` an array of their own.
    trained: dict[str, Array] = field(default_factory=dict)

    def train(self, names: Collection[str]) -> Whole:
        """Itself, with `trained` of these tensors."""
        for name in names:
            array, rows = self.tensors[name], self.rows.get(name)
            self.trained[name] = array if rows is None else array[list(rows)]
        return self

    def lay(self) -> None:
        """Puts the rows that are trained into their tables."""
        for name, rows in self.rows.items():
            if name in self.trained:
                self.tensors[name][list(rows)] = self.trained[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(a.nbytes) for a in self.tensors.values())


def whole_of(adapter: Any) -> Whole | None:
    """What an adapter brings along whole; None where it is A and B alone."""
    found: Whole | None = getattr(adapter, "whole", None)
    return found


def grown(config: LlamaConfig, whole: Whole | None) -> LlamaConfig:
    """The configuration of the model that has these weights."""
    if whole is None:
        return config
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size if whole.vocab is None else whole.vocab,
        tie_word_embeddings=config.tie_word_embeddings and whole.tied,
    )


def check_whole(config: LlamaConfig, whole: Whole) -> LlamaConfig:
    """`grown`, where each tensor is one of the model's, in its shape; else PlanError names it."""
    new = grown(config, whole)
    shapes = new.tensors()
    for name, array in whole.tensors.items():
        if name not in shapes:
            raise PlanError(f"the adapter has the tensor {name!r} whole, which the model has not")
        if tuple(array.shape) != tuple(shapes[name]):
            raise PlanError(
                f"{name}: the adapter's tensor has shape {list(array.shape)}, the model's "
                f"{list(shapes[name])}"
            )
    for name in _tables(new):
        if whole.vocab not in (None, config.vocab_size) and name not in whole.tensors:
            raise PlanError(
                f"the adapter has a vocabulary of {whole.vocab} tokens, but no {name!r} of it"
            )
    return new


def _tables(config: LlamaConfig) -> tuple[str, ...]:
    """The names of the tensors that have a row for each token."""
    names = config.names
    embedding, head = f"{names.embedding}.weight", f"{names.head}.weight"
    return (embedding,) if config.tie_word_embeddings else (embedding, head)


def replaced(config: LlamaConfig, whole: Whole | None) -> dict[str, Array]:
    """The tensors of a model of `config`, which is `grown` and may be untied, that are not the
    base's: a head that is untied now has the embedding's new numbers, too."""
    if whole is None:
        return {}
    names, out = config.names, dict(whole.tensors)
    embedding, head = f"{names.embedding}.weight", f"{names.head}.weight"
    if not config.tie_word_embeddings and whole.tied and embedding in out and whole.was_tied:
        out.setdefault(head, out[embedding])
    return out


def refuse_other_vocabulary(here: LlamaConfig, there: LlamaConfig) -> None:
    """UnsupportedError for an adapter that cannot run beside others: its tokens are not theirs."""
    if here.vocab_size != there.vocab_size:
        raise UnsupportedError(
            f"the adapter has a vocabulary of its own, {there.vocab_size} tokens where the base "
            f"model has {here.vocab_size}, so it cannot run beside the base or other adapters: "
            "give it alone (pylora generate or chat --adapter DIR, pylora.load(model, DIR)), or "
            "merge it (pylora merge) and use the merged model"
        )
