"""Whole weights in PEFT's files: modules_to_save, trainable_token_indices, resized vocabularies.

PEFT writes a module of modules_to_save under its own name, trained rows of a table as
`token_adapter.trainable_tokens_delta` (the rows themselves, not what they differ by), and the
tables of a model whose vocabulary was resized under whatever name their wrappers have. What is
found here becomes a `Whole` (pylora/model/whole.py): tensors of the model, by the model's names.
Every tensor that the settings name must be there; what is no whole weight is left to peft.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import saved_whole
from pylora.errors import PlanError, UnsupportedError, expect
from pylora.formats.base import Array
from pylora.formats.hfnames import transposed
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig
from pylora.model.whole import Whole, grown

Shape = tuple[int, ...]
Load = Callable[[str], Array]  # tensor name of the base model -> float32
Read = Callable[[str, Shape], Array]  # key in the file, shape -> float32, checked

PREFIX = "base_model.model."
_DELTA, _BASE = ".token_adapter.trainable_tokens_delta", ".token_adapter.base_layer.weight"
_UNDER_LORA = ".base_layer.weight"
# Copies that PEFT writes beside a module of modules_to_save where the vocabulary was resized.
_COPY = re.compile(r"(.+)\.(original_module|modules_to_save)\.(?:[^.]+\.)?(weight|bias)")


@dataclass
class Found:
    """Keys of a file by the model's tensor that they are of."""

    tensors: dict[str, str] = field(default_factory=dict)
    deltas: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)  # tables under trained rows or A and B
    originals: list[str] = field(default_factory=list)  # what modules_to_save were before
    twins: list[tuple[str, str]] = field(default_factory=list)  # (key, tensor): the same again

    @property
    def claimed(self) -> set[str]:
        """All keys that are read here."""
        keys = {*self.tensors.values(), *self.deltas.values(), *self.bases.values()}
        return keys | set(self.originals) | {key for key, _ in self.twins}


class Tables:
    """What an adapter of these settings may bring along whole, for a model of this config."""

    def __init__(self, config: LoraConfig, model: LlamaConfig) -> None:
        """Raises PlanError for a name of the settings that is of no module."""
        self.config, self.model = config, model
        names = model.names
        self.embedding, self.head = f"{names.embedding}.weight", f"{names.head}.weight"
        shapes = model.tensors()
        shapes.setdefault(self.head, shapes[self.embedding])
        self.shapes: dict[str, Shape] = shapes
        self.saved = [
            name for name in shapes if saved_whole(config, name.rpartition(".")[0])
        ]  # of modules_to_save
        self._check_names()
        self.rows = self._rows()

    def _check_names(self) -> None:
        for name in self.config.modules_to_save or ():
            if not any(_inside(tensor, name) for tensor in self.shapes):
                leaves = sorted({tensor.split(".")[-2] for tensor in self.shapes})
                raise PlanError(
                    f"modules_to_save: {name!r} matches no module of the model; there are "
                    f"{', '.join(leaves)}"
                )
            if any(self.model.names.layer == path for path in _matched(self.shapes, name)):
                raise UnsupportedError(
                    f"modules_to_save: {name!r} is the list of all layers, which PEFT cannot save "
                    "either; name the modules in them"
                )
        inside = f".{self.model.names.experts}."
        for tensor in self.saved:
            if self.model.experts and inside in tensor:
                raise UnsupportedError(
                    f"modules_to_save names {tensor.rpartition('.')[0]}: experts are neither "
                    "read nor trained whole; adapt them with target_parameters, or merge an "
                    "adapter that has them with PEFT"
                )

    def _rows(self) -> dict[str, tuple[int, ...]]:
        """Of which tables single rows are trained, as PEFT's settings say."""
        said: Any = self.config.trainable_token_indices
        if said is None:
            return {}
        if not isinstance(said, Mapping):
            said = {self.embedding.rpartition(".")[0]: said}
        out: dict[str, tuple[int, ...]] = {}
        for name, ids in said.items():
            found = [t for t in (self.embedding, self.head) if t.rpartition(".")[0].endswith(name)]
            if not found:
                raise PlanError(
                    f"trainable_token_indices: {name!r} is neither the model's embedding nor its "
                    f"head ({self.model.names.embedding}, {self.model.names.head})"
                )
            for tensor in found:
                if tensor in self.saved:
                    raise PlanError(
                        f"trainable_token_indices: {tensor!r} is trained whole already "
                        "(modules_to_save)"
                    )
                out[tensor] = tuple(ids)
        return out

    @property
    def shared_rows(self) -> bool:
        """Whether trained rows are those of a tied head, too: PEFT's rule."""
        if not self.model.tie_word_embeddings or self.embedding not in self.rows:
            return False
        own = self.rows.get(self.head)
        if own is not None and own != self.rows[self.embedding]:
            if self.config.ensure_weight_tying:
                raise PlanError(
                    "trainable_token_indices names other tokens of the head than of the embedding, "
                    "and ensure_weight_tying wants them to be one"
                )
            return False
        return True

    # ---- which keys -----------------------------------------------------------------------------

    def find(self, file: SafeTensors, called: Callable[[str], str]) -> Found:
        """The keys of whole weights in a file; `called` gives a key under the model's names."""
        found = Found()
        for key in file.tensors:
            if ".lora_" not in key:
                self._sort(file, key, called(key).removeprefix(PREFIX), found)
        for tensor in [t for t in found.bases if t in found.tensors]:
            raise PlanError(
                f"{file.path}: {found.bases[tensor]!r} and {found.tensors[tensor]!r} are the same "
                "tensor, twice"
            )
        self._check_missing(file, found)
        return found

    def _sort(self, file: SafeTensors, key: str, name: str, found: Found) -> None:
        tables = (self.embedding, self.head)
        for end, into in ((_DELTA, found.deltas), (_BASE, found.bases)):
            if name.endswith(end):
                tensor = self._named(f"{name.removesuffix(end)}.weight")
                self._put(file, into, tensor, key)
                return
        if copy := _COPY.fullmatch(name):
            tensor = self._named(f"{copy[1]}.{copy[3]}")
            if tensor not in self.saved:
                return
            if copy[2] == "original_module":
                found.originals.append(key)
            else:
                found.twins.append((key, tensor))
            return
        tensor = self._named(name)
        if tensor in self.saved or tensor in tables:
            self._put(file, found.tensors, tensor, key)
        elif name.endswith(_UNDER_LORA):
            tensor = self._named(f"{name.removesuffix(_UNDER_LORA)}.weight")
            own = self.shapes.get(tensor)
            if tensor in tables and own is not None and file.shape(key) != own:
                self._put(file, found.bases, tensor, key)  # of a resized vocabulary

    def _named(self, name: str) -> str:
        """A head is the head also where a multimodal model has it under another name."""
        return self.head if name.endswith(f".{self.head}") else name

    def _put(self, file: SafeTensors, into: dict[str, str], tensor: str, key: str) -> None:
        if tensor in into:
            raise PlanError(f"{file.path}: {into[tensor]!r} and {key!r} are the same tensor, twice")
        into[tensor] = key

    def _check_missing(self, file: SafeTensors, found: Found) -> None:
        for key, tensor in found.twins:
            if tensor not in found.tensors:
                found.tensors[tensor] = key
        found.twins = [(k, t) for k, t in found.twins if found.tensors[t] != k]
        shared = self._head_follows
        for tensor in self.saved:
            if tensor not in found.tensors and not (shared and tensor == self.head):
                raise PlanError(
                    f"{file.path}: modules_to_save names {tensor.rpartition('.')[0]}, but there is "
                    f"no tensor {PREFIX + tensor!r}"
                )
        for tensor in self.rows:
            optional = tensor == self.head and self.shared_rows
            if tensor not in found.deltas and not optional:
                raise PlanError(
                    f"{file.path}: trainable_token_indices names rows of {tensor!r}, but there is "
                    f"no tensor {PREFIX + tensor.rpartition('.')[0] + _DELTA!r}"
                )
        for tensor, key in (*found.deltas.items(), *found.bases.items()):
            known = tensor in self.rows or (tensor == self.head and self.shared_rows)
            if not known and key.endswith((_DELTA, _BASE)):
                raise PlanError(
                    f"{file.path}: the tensor {key!r} is of trained rows that the settings do not "
                    "name (trainable_token_indices)"
                )

    @property
    def _head_follows(self) -> bool:
        """Whether a tied head is whatever the embedding is, although that is saved whole."""
        if not self.model.tie_word_embeddings:
            return False
        if self.embedding in self.saved:
            return self.config.ensure_weight_tying
        return self.head not in self.saved

    # ---- their numbers --------------------------------------------------------------------------

    def read(self, file: SafeTensors, found: Found, read: Read, base: Load | None) -> Whole | None:
        """The whole weights of a file; None where it has none."""
        vocab = self._vocab(file, found)
        model = grown(self.model, Whole({}, vocab=vocab))
        shapes = model.tensors()
        shapes.setdefault(self.head, shapes[self.embedding])
        out: dict[str, Array] = {}
        for tensor, key in (*found.tensors.items(), *found.bases.items()):
            out[tensor] = self._turned(read, key, tensor, shapes[tensor])
        for key, tensor in found.twins:
            if not np.array_equal(self._turned(read, key, tensor, shapes[tensor]), out[tensor]):
                raise PlanError(
                    f"{file.path}: {key!r} and {found.tensors[tensor]!r} are the same module, with "
                    "different numbers"
                )
        for tensor, key in found.deltas.items():
            self._lay_rows(file, key, tensor, out, read, base, shapes)
        resized, had_head = vocab if vocab != self.model.vocab_size else None, self.head in out
        if resized is None and base is not None:
            self._drop_copies(out, base)
        tied = self._tie(out)
        if not out:
            return None
        self._check_tables(file, out, vocab, tied)
        one = self.model.tie_word_embeddings and tied and self.embedding in out
        twin = had_head and one and self.head not in out and self.head not in found.deltas
        return self._made(out, resized, tied, twin)

    def _made(self, out: dict[str, Array], resized: int | None, tied: bool, twin: bool) -> Whole:
        turned = frozenset(name for name in out if transposed(self.model, name))
        was = self.model.tie_word_embeddings
        pair = (self.embedding, self.head) if twin else None
        # In the model's order, whatever that of the file is: the optimizer goes along it.
        trained = [n for n in self.shapes if n in out and (n in self.saved or n in self.rows)]
        return Whole(out, dict(self.rows), resized, tied, was, pair, turned).train(trained)

    # ---- beginning ------------------------------------------------------------------------------

    def begin(self, base: Load) -> Whole | None:
        """What the settings name, as the base has it; None where they name nothing."""
        out: dict[str, Array] = {}
        for tensor in self._begun:
            array = np.array(base(self._source(tensor)), np.float32, order="C")
            if array.shape != self.shapes[tensor]:
                raise PlanError(
                    f"the base's tensor {tensor!r} has shape {list(array.shape)}, expected "
                    f"{list(self.shapes[tensor])}"
                )
            out[tensor] = array
        for tensor, ids in self.rows.items():
            _check_ids(ids, self.shapes[tensor][0])
        if not out:
            return None
        tied = self._tie(out)
        both = self.model.tie_word_embeddings and tied and self.embedding in self.saved
        return self._made(out, None, tied, both)

    @property
    def sizes(self) -> dict[str, int]:
        """How many numbers of each of the base's tensors are trained, without reading them."""
        out = {}
        for tensor in self._begun:
            first, *more = self.shapes[tensor]
            rows = len(self.rows[tensor]) if tensor in self.rows else first
            out[tensor] = rows * math.prod(more)
        return out

    @property
    def _begun(self) -> list[str]:
        """The tensors that a fresh adapter brings. A tied head is its own from then on, unless PEFT
        keeps it tied."""
        follows = self.model.tie_word_embeddings and (self._head_follows or self.shared_rows)
        named = dict.fromkeys((*self.saved, *self.rows))
        return [tensor for tensor in named if not (tensor == self.head and follows)]

    def _drop_copies(self, out: dict[str, Array], base: Load) -> None:
        """Tables that PEFT wrote although they are the base's (save_embedding_layers=True)."""
        for tensor in [t for t in out if t not in self.saved and t not in self.rows]:
            if tensor == self.head and self.shared_rows:
                continue
            if np.array_equal(base(self._source(tensor)), out[tensor]):
                del out[tensor]

    def _source(self, tensor: str) -> str:
        """The base's tensor that a tensor is instead of."""
        tied = self.model.tie_word_embeddings and tensor == self.head
        return self.embedding if tied else tensor

    def _turned(self, read: Read, key: str, tensor: str, shape: Shape) -> Array:
        """A tensor in the decoder's layout, whatever the files of the family have."""
        if not transposed(self.model, tensor):
            return read(key, shape)
        return np.ascontiguousarray(read(key, shape[::-1]).T)

    def _vocab(self, file: SafeTensors, found: Found) -> int:
        """How many rows embedding and head have in the file; the model's where it has neither."""
        sizes: dict[str, int] = {}
        for tensor in (self.embedding, self.head):
            key = found.tensors.get(tensor, found.bases.get(tensor))
            if key is not None:
                shape = file.shape(key)
                if len(shape) != 2 or shape[1] != self.model.hidden_size or not shape[0]:
                    raise PlanError(
                        f"{file.path}: tensor {key!r} has shape {shape}, expected "
                        f"[tokens, {self.model.hidden_size}]"
                    )
                sizes[key] = shape[0]
        if len(set(sizes.values())) > 1:
            said = " and ".join(f"{key!r} {n}" for key, n in sizes.items())
            raise PlanError(f"{file.path}: the vocabularies differ, rows of {said}")
        return next(iter(sizes.values()), self.model.vocab_size)

    def _lay_rows(
        self,
        file: SafeTensors,
        key: str,
        tensor: str,
        out: dict[str, Array],
        read: Read,
        base: Load | None,
        shapes: Mapping[str, Shape],
    ) -> None:
        """Puts trained rows into their table."""
        ids = self.rows.get(tensor, self.rows.get(self.embedding, ()))
        size, hidden = shapes[tensor]
        rows = read(key, (len(ids), hidden))
        _check_ids(ids, size, f"{file.path}: ")
        if tensor not in out:
            if base is None:
                raise PlanError(
                    f"{file.path}: tensor {key!r} is rows of a table whose others are the base "
                    "model's; give the base model's tensors too (base=checkpoint.load)"
                )
            out[tensor] = np.array(base(self._source(tensor)), np.float32, order="C")
        out[tensor][list(ids)] = rows

    def _tie(self, out: dict[str, Array]) -> bool:
        """Whether a tied head is the new embedding; then its copy is dropped."""
        if not self.model.tie_word_embeddings:
            return True
        there = {self.embedding, self.head} & set(out)
        if not there:
            return True
        if not (self._head_follows or self.shared_rows) or there == {self.head}:
            return False
        own = out.get(self.head)
        if own is not None and not np.array_equal(own, out[self.embedding]):
            return False
        out.pop(self.head, None)
        return True

    def _check_tables(
        self, file: SafeTensors, out: Mapping[str, Array], vocab: int, tied: bool
    ) -> None:
        if vocab == self.model.vocab_size:
            return
        both = self.model.tie_word_embeddings and tied
        for tensor in (self.embedding,) if both else (self.embedding, self.head):
            if tensor not in out:
                raise PlanError(
                    f"{file.path}: the vocabulary was resized, to {vocab} tokens from the base "
                    f"model's {self.model.vocab_size}, but there is no {PREFIX + tensor!r} of that "
                    "size; save the adapter with both tables (PEFT: modules_to_save = "
                    "['embed_tokens', 'lm_head'], or save_embedding_layers=True)"
                )


def fresh_whole(config: LoraConfig, model: LlamaConfig, base: Load) -> Whole | None:
    """The base's weights that an adapter of these settings trains whole (modules_to_save) or in
    rows (trainable_token_indices), as a new adapter begins with them; None where it trains none.

    `base` is Checkpoint.load. PlanError for a name that matches nothing, for a token that there is
    not, and for a table with LoRA and trained rows; UnsupportedError for experts.
    """
    expect("model configuration", model, "fresh_whole(config, model, base)")
    return Tables(config, model).begin(base) if _names_any(config) else None


def num_whole(config: LoraConfig, model: LlamaConfig) -> int:
    """How many numbers of the base an adapter of these settings trains."""
    return sum(Tables(config, model).sizes.values()) if _names_any(config) else 0


@dataclass(frozen=True)
class Named:
    """What an adapter's settings train whole, for who shows it."""

    names: dict[str, str]  # tensor -> " (n rows)", or nothing
    trained: int  # numbers


def whole_named(config: LoraConfig, model: LlamaConfig, brought: Whole | None = None) -> Named:
    """Of the settings; and the tensors of an adapter that is there."""
    names = {} if brought is None else dict.fromkeys(brought.tensors, "")
    if not _names_any(config):
        return Named(names, 0)
    tables = Tables(config, model)
    for tensor in tables.sizes:
        rows = tables.rows.get(tensor)
        names[tensor] = f" ({len(rows)} rows)" if rows else ""
    return Named(names, sum(tables.sizes.values()))


def _check_ids(ids: Sequence[int], size: int, where: str = "") -> None:
    if max(ids) >= size:
        raise PlanError(
            f"{where}trainable_token_indices names the token {max(ids)}, and the vocabulary has "
            f"{size}"
        )


def _names_any(config: LoraConfig) -> bool:
    return bool(config.modules_to_save or config.trainable_token_indices)


def _matched(shapes: Mapping[str, Shape], name: str) -> set[str]:
    """The paths of modules, of lists of them too, that end in a name."""
    out = set()
    for tensor in shapes:
        parts = tensor.split(".")[:-1]
        paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        out |= {path for path in paths if path.endswith(name)}
    return out


def _inside(tensor: str, name: str) -> bool:
    return bool(_matched({tensor: ()}, name))


def tensors_of(whole: Whole, adapted: set[str]) -> dict[str, Array]:
    """Key -> array of whole weights, as PEFT writes them beside A and B of modules `adapted`."""
    out: dict[str, Array] = {}
    for tensor, array in whole.tensors.items():
        path = tensor.rpartition(".")[0]
        rows = whole.rows.get(tensor)
        if rows is not None:
            out[PREFIX + path + _DELTA] = array[list(rows)]
            if whole.vocab is not None:
                out[PREFIX + path + _BASE] = array
        elif path in adapted:
            out[PREFIX + path + _UNDER_LORA] = array
        else:
            out[PREFIX + tensor] = array.T if tensor in whole.turned else array
    if whole.twin:
        out[PREFIX + whole.twin[1]] = whole.tensors[whole.twin[0]]
    return out
