"""A checkpoint with some tensors of another source in place of its own.

What an adapter brings along whole (pylora/model/whole.py) is then part of the base, for who looks
at weights one by one. Neither the checkpoint nor the tensors are changed; the tokenizer is the
checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pylora.formats.base import Array, Checkpoint, Shape
from pylora.model.whole import Whole, check_whole, replaced

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer


class Overlaid(Checkpoint):
    """`checkpoint` with the tensors of `whole`, which are float32."""

    def __init__(self, checkpoint: Checkpoint, whole: Whole) -> None:
        """PlanError for a tensor that is none of the model's, or misshapen."""
        self.under, self.path, self.notes = checkpoint, checkpoint.path, checkpoint.notes
        self.config = check_whole(checkpoint.config, whole)
        self._own = replaced(self.config, whole)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.under.settings

    def names(self) -> tuple[str, ...]:
        return tuple(self.config.tensors())

    def _source(self, name: str) -> str:
        """A head that is untied has the embedding's numbers in the file."""
        base, names = self.under.config, self.config.names
        head = name == f"{names.head}.weight" and base.tie_word_embeddings
        return f"{names.embedding}.weight" if head else name

    def shape(self, name: str) -> Shape:
        return self._own[name].shape if name in self._own else self.under.shape(self._source(name))

    def dtype(self, name: str) -> str:
        return "f32" if name in self._own else self.under.dtype(self._source(name))

    def load(self, name: str) -> Array:
        return self._own[name] if name in self._own else self.under.load(self._source(name))

    def raw(self, name: str) -> tuple[Array, str]:
        if name in self._own:
            return self._own[name], "f32"
        return self.under.raw(self._source(name))

    def parts(self, name: str) -> Iterator[Array]:
        if name in self._own:
            yield self._own[name]
        else:
            yield from self.under.parts(self._source(name))

    def tokenizer(self) -> Tokenizer:
        return self.under.tokenizer()

    def close(self) -> None:
        self.under.close()
