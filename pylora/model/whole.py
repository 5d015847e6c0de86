"""Weights that an adapter brings along whole, and the model that has them in place of its own.

PEFT's modules_to_save, its trainable_token_indices and the tables of a resized vocabulary all come
to the same: some tensors of the base model are others. `Llama.with_whole` makes the model that has
them; it shares every other weight. Reading them from files is in adapters/whole.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pylora.errors import PlanError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.ops.protocol import Packed
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


class Shared:
    """The tensors of a model that is loaded, some of them replaced: what `Llama(...)` is given.

    Matrices are the packed ones of the other model, not copies of them.
    """

    def __init__(self, model: Any, whole: Whole) -> None:
        self._whole, self._vectors = whole.tensors, model.vectors
        self._packed: dict[str, Packed] = {
            f"{model.embed_tokens.path}.weight": model.embed_tokens.W
        }
        names = model.config.names
        for block in model.blocks:
            self._packed |= {f"{p.path}.weight": p.W for p in block.numbered}
            if block.router is not None:
                self._packed[f"{block.path}.{names.router}.weight"] = block.router
        if model.trunk.positions is not None:
            self._packed[f"{names.positions}.weight"] = model.trunk.positions
        self._packed[f"{names.head}.weight"] = model.lm_head.W

    def __call__(self, name: str) -> Any:
        if name in self._whole:
            return self._whole[name]
        return self._packed[name] if name in self._packed else self._vectors[name]


# What of a model is of its weights, and is another's where an adapter brings weights of its own.
_PARTS = (
    "config", "vectors", "rope", "embed_tokens", "blocks", "norm", "lm_head", "trunk", "head",
    "modules", "whole",
)  # fmt: skip


class HasWhole:
    """A model (`Llama`) whose weights may be an adapter's in part."""

    config: LlamaConfig
    whole: Whole | None  # the weights here that are an adapter's
    _home: dict[str, Any] | None  # the parts of the base while others are here

    def with_whole(self, whole: Whole) -> Any:
        """The model that has these weights in place of its own; it shares all the others.

        What is attached here is not attached there. PlanError for a tensor that does not fit.
        """
        if whole is self.whole:
            return self
        self._refuse_second()
        model: Any = self
        config = check_whole(self.config, whole)
        made = type(model)(
            config, Shared(self, whole), backend=model.ops, precision=model.precision, like=self
        )
        made.whole, made.stored_as = whole, model.stored_as
        return made

    @property
    def home_config(self) -> LlamaConfig:
        """The base's configuration, whatever is attached."""
        config: LlamaConfig = self._at_home("config")
        return config

    def _refuse_second(self) -> None:
        if self._at_home("whole") is not None:
            raise UnsupportedError(
                "this model has the whole weights of an adapter already; load the base model again "
                "for another one"
            )

    def _at_home(self, name: str) -> Any:
        """A part as it is without the attached adapter's whole weights."""
        return getattr(self, name) if self._home is None else self._home[name]

    def _become(self, whole: Whole | None) -> None:
        """Has these weights in place of the base's from now on; None: the base's."""
        if whole is self.whole or (whole is None and self._home is None):
            return
        if self._home is not None:
            vars(self).update(self._home)
            self._home = None
        if whole is not None:
            made = self.with_whole(whole)
            self._home = {name: getattr(self, name) for name in _PARTS}
            vars(self).update({name: getattr(made, name) for name in _PARTS})
        for name in ("op", "mixed", "numbers"):
            vars(self).pop(name, None)


def alone(model: Any, adapters: Sequence[Any]) -> Any:
    """The model to run these adapters on: one whose vocabulary is of another size, and that is
    the only one, gets a model that has its tables; it is the base from then on."""
    if len(adapters) != 1 or (whole := whole_of(adapters[0])) is None or whole.vocab is None:
        return model
    return model.with_whole(whole)


def refuse_other_vocabulary(here: LlamaConfig, there: LlamaConfig) -> None:
    """UnsupportedError for an adapter that cannot run beside others: its tokens are not theirs."""
    if here.vocab_size != there.vocab_size:
        raise UnsupportedError(
            f"the adapter has a vocabulary of its own, {there.vocab_size} tokens where the base "
            f"model has {here.vocab_size}, so it cannot run beside the base or other adapters: "
            "give it alone (pylora generate or chat --adapter DIR, pylora.load(model, DIR)), or "
            "merge it (pylora merge) and use the merged model"
        )
