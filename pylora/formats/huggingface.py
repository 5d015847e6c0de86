"""Hugging Face model directories: config.json beside model.safetensors, whole or in shards.

Only safetensors weights are read, never pickles. The tensors must be exactly those that the
configuration implies; what an older exporter left behind (rotary tables, a copy of tied
embeddings) is recognised by name and checked. Values, such as NaN, are not judged. Quantized
weights (quantized/) are dequantized where they are read, one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.files.bounded import read_json
from pylora.formats.base import Array, Checkpoint, Shape, check_tensors, read_config, widen
from pylora.formats.hfnames import own_names, text_settings, transposed
from pylora.formats.quantized import Quantized, Scheme, Source, plain_settings, scheme
from pylora.formats.safetensors import SafeTensors
from pylora.model.config import LlamaConfig

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG = 4 << 20  # bytes
MAX_INDEX = 64 << 20
_FLOATS = ("f32", "f16", "bf16")
# A tensor of all experts -> the roles (families.family.Names) of what each has in it.
_STACKED = {"gate_up_proj": ("expert_gate", "expert_up"), "down_proj": ("expert_down",)}


class HuggingFaceCheckpoint(Checkpoint):
    """A model directory as a Checkpoint. Raises FileFormatError or UnsupportedError on opening."""

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / "config.json"
        settings = read_json(file, limit=MAX_CONFIG)
        _refuse_mlx(path, settings)
        self.scheme = scheme(str(file), settings)
        self._settings = plain_settings(settings)
        self.config = read_config(file, self._settings)
        names = self.config.names
        self._head, self._embedding = f"{names.head}.weight", f"{names.embedding}.weight"
        stored, notes = _open_files(path, self.config, self.scheme)
        # By the name that the model has for a tensor: the file, and the name there.
        own, others = own_names(self.config, stored)
        self._stacks: dict[str, tuple[int, str]] = {}  # of stacked experts: which, and which part
        self._unstack(own, stored)
        self._files = {name: stored[there] for name, there in own.items()}
        for name, source in self._files.items():
            if isinstance(source, Quantized):  # which is [out, in] even where a file turns weights
                source.turned = transposed(self.config, name)
        self._stored = own
        if isinstance(self._settings.get("text_config"), Mapping):
            self.config = self._tied_as_stored()
        if others:
            notes += (
                f"{path} is a multimodal model: its language model is read, and {len(others)} "
                f"tensors of other parts, such as {others[0][:100]!r}, are not",
            )
        if (path / "adapter_config.json").is_file():
            notes += (
                f"{path} holds an adapter beside the model (adapter_config.json), which is not "
                "used unless it is named as the adapter",
            )
        if self.scheme is not None:
            notes += (self._said(),)
        self.notes = notes
        shapes = {name: self.shape(name) for name in self._files}
        if self.config.tie_word_embeddings and self._head in shapes:
            self._check_tied()
            del shapes[self._head]
        self._names = check_tensors(path, self.config, shapes)
        for name in self._names:
            if (dtype := self.dtype(name)) not in _FLOATS:
                needs = "only F32, F16 and BF16 weights are supported"
                if self.scheme is not None:
                    needs = f"nothing that {self.scheme.method} dequantizes it with is there"
                raise UnsupportedError(
                    f"{self._files[name].path}: tensor {name!r} is {dtype.upper()}; {needs}"
                )

    def _said(self) -> str:
        """What a user should know of a quantized model."""
        forms = sorted({self.form(n) for n, f in self._files.items() if isinstance(f, Quantized)})
        return (
            f"{self.path} is quantized ({', '.join(forms)}): its weights are dequantized as they "
            "are read, and then kept in the precision that was chosen"
        )

    def _unstack(self, own: dict[str, str], stored: Mapping[str, Source]) -> None:
        """Takes tensors that hold all experts of a layer apart (Qwen3-VL's): [experts, hidden,
        2 size] of gate and up, [experts, size, hidden] of down; or each the other way around."""
        names, experts = self.config.names, self.config.experts
        for name in [n for n in own if n.endswith(tuple(f".experts.{p}" for p in _STACKED))]:
            there, (at, _, part) = own.pop(name), name.rpartition(".")
            shape = stored[there].shape(there)
            if not experts or len(shape) != 3 or shape[0] != experts:
                raise FileFormatError(
                    f"{self.path}: tensor {name!r} has shape {shape}, but the configuration says "
                    f"{experts} experts"
                )
            for e in range(experts):
                for role in _STACKED[part]:
                    one = f"{at}.{e}.{getattr(names, role)}.weight"
                    own[one], self._stacks[one] = there, (e, role)

    def _tied_as_stored(self) -> LlamaConfig:
        """Of a multimodal model it is the outer configuration's class that says whether the head is
        tied, and a file leaves out what its class has by default: what is stored counts."""
        head, embedding = self._head, self._embedding
        if head not in self._files:
            return replace(self.config, tie_word_embeddings=True)
        same = embedding in self._files and self.dtype(head) == self.dtype(embedding)
        same = same and np.array_equal(_bits(self._view(head)), _bits(self._view(embedding)))
        return replace(self.config, tie_word_embeddings=self.config.tie_word_embeddings and same)

    def _check_tied(self) -> None:
        """A stored copy of a tied output projection may be left out only if it is the embedding."""
        head, embedding = self._head, self._embedding
        if embedding not in self._files:
            raise FileFormatError(f"{self.path}: there is no tensor {embedding!r}")
        same = self.dtype(head) == self.dtype(embedding)
        if not same or not np.array_equal(_bits(self._view(head)), _bits(self._view(embedding))):
            raise FileFormatError(
                f"{self.path}: config.json says tie_word_embeddings, but {head!r} is stored and "
                f"differs from {embedding!r}; one of the two is wrong"
            )

    @property
    def settings(self) -> Mapping[str, Any]:
        return text_settings(self.config, self._settings)

    def names(self) -> tuple[str, ...]:
        return self._names

    def _file(self, name: str) -> Source:
        if name not in self._files:
            raise FileFormatError(f"{self.path}: there is no tensor {name!r}")
        return self._files[name]

    def _view(self, name: str) -> Array:
        file, there = self._file(name), self._stored[name]
        if name not in self._stacks:
            return file.view(there)
        (e, role), size = self._stacks[name], self.config.expert_size
        array = file.part(there, e) if isinstance(file, Quantized) else file.view(there)[e]
        down = role == "expert_down"
        turned = (size, self.config.hidden_size) if down else (self.config.hidden_size, 2 * size)
        one: Array = array.T if array.shape == turned else array
        return one if down else one[:size] if role == "expert_gate" else one[size:]

    def shape(self, name: str) -> Shape:
        if name in self._stacks:
            return self._stacked_shape(name)
        shape = self._file(name).shape(self._stored[name])
        return shape[::-1] if transposed(self.config, name) else shape

    def _stacked_shape(self, name: str) -> Shape:
        """What `_view` of one of stacked experts gives; FileFormatError where it cannot be."""
        hidden, size = self.config.hidden_size, self.config.expert_size
        down = self._stacks[name][1] == "expert_down"
        want = (hidden, size) if down else (2 * size, hidden)
        shape = self._file(name).shape(self._stored[name])
        if shape[1:] not in (want, want[::-1]):
            raise FileFormatError(
                f"{self.path}: tensor {self._stored[name]!r} has shape {shape}, but the "
                f"configuration says {want[0]} x {want[1]} of each expert"
            )
        return want if down else (size, hidden)

    def dtype(self, name: str) -> str:
        return self._file(name).dtype(self._stored[name])

    def form(self, name: str) -> str:
        file = self._file(name)
        return file.form(name) if isinstance(file, Quantized) else self.dtype(name)

    def load(self, name: str) -> Array:
        return widen(*self.raw(name))

    def raw(self, name: str) -> tuple[Array, str]:
        array = self._view(name)
        if name in self._stacks:
            array = np.ascontiguousarray(array)
        if transposed(self.config, name):
            array = np.ascontiguousarray(array.T)
        return array, self.dtype(name)

    def tokenizer(self) -> Tokenizer:
        from pylora.text.tokenizer import tokenizer_from_directory

        return tokenizer_from_directory(self.path)

    def close(self) -> None:
        for file in set(self._files.values()):
            file.close()
        self._files = {}


def _bits(x: Array) -> Array:
    """The bytes of an array, so that comparing is about bits: NaN equals itself, 0 is not -0."""
    return x.reshape(-1).view(np.uint8)


def _refuse_mlx(path: Path, settings: Mapping[str, Any]) -> None:
    """MLX keeps quantized weights in a form of its own, in files that look like Hugging Face's."""
    if isinstance(settings.get("quantization"), Mapping):
        raise UnsupportedError(
            f"{path}: this is a model that MLX quantized ({dict(settings['quantization'])!r:.80}); "
            "pylora reads it dequantized: mlx_lm.convert --dequantize --hf-path DIR --mlx-path NEW"
        )


def _open_files(
    directory: Path, config: LlamaConfig, quantized: Scheme | None
) -> tuple[dict[str, Source], tuple[str, ...]]:
    """Tensor name -> the open file that holds it, or what dequantizes it; and what to say of files
    that are passed over.

    Where there are a whole file and an index, the one that has all tensors of the model counts.
    """
    files, notes = _chosen(directory, config, quantized)
    if quantized is None:
        return dict(files), notes
    return quantized.weights(files), notes


def _chosen(
    directory: Path, config: LlamaConfig, quantized: Scheme | None
) -> tuple[dict[str, SafeTensors], tuple[str, ...]]:
    """Tensor name -> file, of the whole file or of the shards."""
    whole, index = directory / WHOLE, directory / INDEX
    if not (whole.is_file() and index.is_file()):
        return _one_form(directory), ()
    file = SafeTensors(whole)
    table = read_json(index, limit=MAX_INDEX).get("weight_map")
    listed = table if isinstance(table, dict) else {}
    plain = list if quantized is None else quantized.plain
    here, there = (own_names(config, plain(map(str, n)))[0] for n in (file.tensors, listed))
    missing = [name for name in config.tensors() if name not in here]
    lacks = [name for name in config.tensors() if name not in there]
    if missing and not lacks:
        note = f"{whole} was passed over: it lacks {len(missing)} tensors that {INDEX} lists"
        return _sharded(directory), (note,)
    if lacks and not missing:
        note = f"{index} was passed over: it lacks {len(lacks)} tensors that {WHOLE} has"
        return dict.fromkeys(file.tensors, file), (note,)
    raise FileFormatError(
        f"{directory}: there are {WHOLE} and {INDEX}, "
        + ("and both lack tensors" if missing else "each with a whole model")
        + "; take away the one that does not belong there"
    )


def _one_form(directory: Path) -> dict[str, SafeTensors]:
    whole, index = directory / WHOLE, directory / INDEX
    if whole.is_file():
        file = SafeTensors(whole)
        return dict.fromkeys(file.tensors, file)
    if not index.is_file():
        pickles = sorted(p.name for p in directory.glob("pytorch_model*.bin"))
        hint = f"; {pickles[0]} is a pickle, which pylora does not read" if pickles else ""
        raise FileFormatError(f"{directory}: there is neither {WHOLE} nor {INDEX}{hint}")
    return _sharded(directory)


def _sharded(directory: Path) -> dict[str, SafeTensors]:
    index = directory / INDEX
    table = read_json(index, limit=MAX_INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FileFormatError(f"{index}: weight_map is missing, empty or not an object")
    shards: dict[str, SafeTensors] = {}
    for name, shard in table.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _leaves(shard):
            raise FileFormatError(
                f"{index}: tensor {name[:200]!r} is in {str(shard)[:200]!r}, "
                "which is not the name of a safetensors file in the same directory"
            )
        if shard not in shards:
            shards[shard] = SafeTensors(directory / shard)
        if name not in shards[shard].tensors:
            raise FileFormatError(
                f"{directory / shard}: there is no tensor {name[:200]!r}, though {INDEX} says so"
            )
    for shard, file in shards.items():
        for name in file.tensors:
            if table.get(name) != shard:
                raise FileFormatError(
                    f"{file.path}: tensor {name[:200]!r} is not listed for this file in {INDEX}"
                )
    return {name: shards[shard] for name, shard in table.items()}


def _leaves(name: str) -> bool:
    return any(mark in name for mark in "/\\:\0") or name.startswith(".")
