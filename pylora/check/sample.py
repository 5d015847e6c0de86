"""What `pylora check` runs on: a batch of tokens, an adapter if none is given, and as many layers
as fit into memory in float64."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.check.rounding import Exact
from pylora.errors import ConfigError
from pylora.formats import Checkpoint
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.numbers import random
from pylora.reference import IGNORE
from pylora.training.examples import Tokenizer, check_examples, load_examples
from pylora.training.memory import free_bytes
from pylora.types import LoRA, Seqs, brief

FIELDS = ("A", "B", "bias", "base_bias", "magnitude")  # the arrays of a LoRA
MIN_TOKENS = 8
_USABLE = 0.7  # of the memory that is free


@dataclass(frozen=True, eq=False)
class Batch:
    """Three sequences of uneven lengths, one behind the other."""

    __repr__ = brief

    ids: np.ndarray  # int64 [m]
    labels: np.ndarray  # int64 [m], shifted, IGNORE where nothing counts
    lengths: tuple[int, ...]

    @property
    def seqs(self) -> Seqs:
        return Seqs.of(self.lengths)

    def parts(self) -> list[np.ndarray]:
        """The ids of each sequence."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1])


def sample(
    config: LlamaConfig,
    tokens: int,
    seed: int,
    data: str | os.PathLike[str] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Batch:
    """At most `tokens` tokens: random ones, or the ends of three examples of the file `data`.

    Raises ConfigError for an impossible number, DataError for a file that cannot be used.
    """
    if tokens < MIN_TOKENS:
        raise ConfigError(f"tokens = {tokens}: at least {MIN_TOKENS} are needed")
    if not 0 <= seed < 2**64:
        raise ConfigError(f"seed = {seed}: expected a number from 0 to 2^64 - 1")
    first, second = tokens // 2, tokens // 3
    lengths = (first, second, tokens - first - second)
    if first > config.max_position_embeddings:
        raise ConfigError(
            f"tokens = {tokens}: the longest sequence, {first}, exceeds the model's "
            f"{config.max_position_embeddings} positions"
        )
    if data is None or tokenizer is None:
        u = random.unit(seed, random.stream("check", "tokens"), 0, tokens + 1)
        ids = (u * config.vocab_size).astype(np.int64)
        return Batch(ids[:-1], ids[1:].copy(), lengths)
    examples = load_examples(data, tokenizer)
    check_examples(examples, config, str(data))
    u = random.unit(seed, random.stream("check", "examples"), 0, len(examples))
    chosen = [examples[int(i)] for i in np.resize(np.argsort(u), 3)]
    # The last label of an example counts, so its end is never without a loss.
    ends = [(e.ids[-n:], e.labels[-n:]) for e, n in zip(chosen, lengths, strict=True)]
    ids, labels = (np.concatenate(arrays) for arrays in zip(*ends, strict=True))
    return Batch(ids, labels, tuple(len(ids) for ids, _ in ends))


def counted(batch: Batch) -> int:
    """How many labels count."""
    return int((batch.labels != IGNORE).sum())


def default_adapter(config: LlamaConfig, seed: int) -> Adapter:
    """r = 8 on the attention's projections, with A and B random: a delta of a few percent of each
    weight."""
    roles = config.features.attention_modules
    targets = tuple(getattr(config.names, role).rpartition(".")[2] for role in roles)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, init_lora_weights=False)
    adapter = Adapter.init(resolve(lora, config.modules()), lora, seed)
    for module in adapter.values():
        module.B[...] *= np.float32(1 / 16)
    return adapter


# ---- what fits into memory -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """The top layers of the model, from layer `first` on, as a model of its own.

    Its layer i is the model's layer first + i, with the real weights; the embedding feeds its
    lowest layer directly. With first = 0 it is the whole model.
    """

    __repr__ = brief

    config: LlamaConfig
    first: int
    load: Callable[[str], np.ndarray]  # a tensor of the part -> float32
    adapter: Mapping[str, LoRA]  # by the part's own paths

    @cached_property
    def wide(self) -> Mapping[str, np.ndarray]:
        """Every tensor in float64, by the part's own names; made once and kept."""
        return {name: self.load(name).astype(np.float64) for name in self.config.tensors()}

    @cached_property
    def wide_adapter(self) -> Mapping[str, LoRA]:
        """The adapter in float64, with the scales that float32 arithmetic uses."""
        return {path: _as_float64(lora) for path, lora in self.adapter.items()}

    def model(self, ops: Exact) -> Llama:
        """The part in float64 with its adapter; the weights are shared by all such models."""
        model = Llama(self.config, self.wide.__getitem__, backend=ops)
        model.attach(self.wide_adapter)
        return model

    def whole(self, path: str) -> str:
        """The model's name for a module or tensor of the part."""
        return _renumber(path, self.first)

    def own(self, path: str) -> str | None:
        """The part's name for a module of the model; None if it is below the part."""
        words = path.split(".")
        below = _in_layer(words) and int(words[2]) < self.first
        return None if below else _renumber(path, -self.first)


def _as_float64(lora: LoRA) -> LoRA:
    arrays = {f: getattr(lora, f) for f in FIELDS}
    wide: dict[str, Any] = {
        f: None if a is None else a.astype(np.float64) for f, a in arrays.items()
    }
    return dataclasses.replace(lora, scale=float(np.float32(lora.scale)), **wide)


def _in_layer(words: list[str]) -> bool:
    """Whether the third word of a path is a layer's number: model.layers.3, transformer.h.3."""
    return len(words) > 2 and words[1] in ("layers", "h") and words[2].isdecimal()


def _renumber(path: str, by: int) -> str:
    words = path.split(".")
    if _in_layer(words):
        words[2] = str(int(words[2]) + by)
    return ".".join(words)


def part_of(checkpoint: Checkpoint, adapter: Adapter, memory: float) -> Part | None:
    """The largest part that fits into `memory` bytes in float64 and has an adapter, or None."""
    config = checkpoint.config
    for first in range(config.num_hidden_layers):
        small = config.top(first)
        if bytes_needed(small, whole=first == 0) > _USABLE * memory:
            continue
        part = Part(small, first, _loader(checkpoint, first), {})
        own = {name: lora for path, lora in adapter.items() if (name := part.own(path))}
        return dataclasses.replace(part, adapter=own) if own else None
    return None


def _loader(checkpoint: Checkpoint, first: int) -> Callable[[str], np.ndarray]:
    return lambda name: checkpoint.load(_renumber(name, first))


def bytes_needed(config: LlamaConfig, *, whole: bool) -> int:
    """The weights in float64, three arrays of the largest one's size (its squares, its float32
    original), and the packed weights once more unless they are there already."""
    sizes = [int(np.prod(shape)) for shape in config.tensors().values()]
    return 8 * sum(sizes) + 3 * 8 * max(sizes) + (0 if whole else 4 * sum(sizes))


def available_memory() -> float:
    """Bytes that this process may still use: the machine's, or less where a cgroup limits it."""
    free = free_bytes()
    return free if np.isfinite(free) else 2.0**32
