"""Steps of a batch through a model: which tokens, whose adapter, which rows of the KV cache.

A batch lives from one change of its members to the next. What stays the same in between (the order
of the sequences, their adapters' segments) is worked out once; a step of one token for each
sequence then only counts up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from pylora.errors import ConfigError, ShapeError
from pylora.model.attach import Module
from pylora.model.attention import positions
from pylora.model.config import LlamaConfig
from pylora.model.embedding import Embedding
from pylora.model.expert_lora import ExpertParameter
from pylora.model.kvcache import KVCache
from pylora.model.mixed import Mixed, OwnWeights
from pylora.model.rope import Rope
from pylora.model.whole import Whole, grown, refuse_other_vocabulary, whole_of
from pylora.ops.llama import LlamaOp, LlamaWeights, Runs, Step
from pylora.types import Array, LoRA, Seqs


class Decodable(Protocol):
    """What decoding asks of a model."""

    config: LlamaConfig
    rope: Rope
    modules: dict[str, Module]
    embed_tokens: Embedding
    whole: Whole | None

    def with_whole(self, whole: Whole) -> Any: ...

    @property
    def numbers(self) -> dict[str, int]: ...

    @property
    def op(self) -> LlamaOp: ...

    @property
    def mixed(self) -> Mixed: ...


def operation_weights(model: Any) -> LlamaWeights:
    """The weights of a `Llama` as the whole-model operation takes them. Nothing is copied."""
    return LlamaWeights(
        model.embed_tokens.W,
        model.lm_head.W,
        model.norm,
        model.trunk.layer_weights(),
        model.blocks[0].attention.shape,
        model.activation_dtype,
        model.config.features,
        model.trunk.positions,
        model.rope.by_length,
    )


def pack_attached(model: Decodable) -> Any:
    """The adapter that is attached to the model, as it is now; None without one."""
    attached = {path: m.lora for path, m in model.modules.items() if m.lora is not None}
    return pack_adapter(model, attached) if attached else None


def pack_adapter(model: Decodable, adapter: Mapping[str, LoRA]) -> Any:
    """The adapter as it is now, ready for the backend. `adapter` fits the model.

    UnsupportedError for one whose whole weights are of another vocabulary than the model's.
    """
    whole = whole_of(adapter)
    if whole is not None and whole is not model.whole:
        refuse_other_vocabulary(model.config, grown(model.config, whole))
        own = model.with_whole(whole)
        packed = _packed(own, adapter) if adapter else None
        return OwnWeights(own.op, packed, whole.nbytes + (packed.nbytes if packed else 0))
    return _packed(model, adapter)


def _packed(model: Decodable, adapter: Mapping[str, LoRA]) -> Any:
    numbers = model.numbers
    parts: dict[str, LoRA] = {}
    for path, lora in adapter.items():
        module = model.modules[path]
        parts |= module.split(lora) if isinstance(module, ExpertParameter) else {path: lora}
    linear = {
        numbers[path]: lora if lora.magnitude is None else model.modules[path].measured(lora)
        for path, lora in parts.items()
        if path in numbers
    }
    embedding = adapter.get(model.embed_tokens.path)
    return model.op.adapter(
        linear, None if embedding is None else model.embed_tokens.measured(embedding)
    )


class Batch:
    """Some sequences of a KV cache, each with an adapter of `LlamaOp.adapter` or None.

    Sequences whose adapters are the same object must lie side by side where that matters for speed:
    each run of them is one segment.
    """

    def __init__(
        self,
        model: Decodable,
        kv: KVCache,
        lengths: Sequence[int],
        slots: np.ndarray,
        adapters: Sequence[Any],
        spans: np.ndarray | None = None,
    ) -> None:
        """Errors: those of `KVCache.place`. Nothing is stored yet.

        `spans`, int64 [tokens]: how long the text is with which each token is rotated, where that
        is not as long as its sequence is by now: a prompt that comes in parts is one text. It
        counts where the frequencies depend on the length (`Rope.by_length`).
        """
        self.model, self.kv, self.slots = model, kv, slots
        own = any(isinstance(adapter, OwnWeights) for adapter in adapters)
        self.op: Runs = model.mixed if own else model.op
        self.seqs, rows = kv.place(lengths, slots)
        q_start = self.seqs.q_start
        new = [i for i, a in enumerate(adapters) if i == 0 or a is not adapters[i - 1]]
        start = np.append(q_start[new], q_start[-1]) if new else np.zeros(1, np.int64)
        self._longest = int(self.seqs.k_len.max(initial=0))
        position = positions(self.seqs)
        self._covered = model.rope.covers(self._longest)
        self.step = Step(
            np.zeros(int(q_start[-1]), np.int64),
            position,
            rows,
            self.seqs,
            q_start[1:] - 1,
            np.ascontiguousarray(start, np.int64),
            tuple(adapters[i] for i in new),
            model.rope.rotations(_apart(self.seqs, spans), position),
        )

    def forward(self, ids: np.ndarray | Sequence[int]) -> Array:
        """Token ids, one sequence behind the other -> logits of the last token of each."""
        step = self.step
        if len(ids) != step.ids.size:
            raise ShapeError(f"{len(ids)} ids for lengths that add up to {step.ids.size}")
        step.ids[:] = ids
        logits = self.op.forward(self.kv.handle(self.op), step)
        self.kv.length[self.slots] = self.seqs.k_len
        return logits

    def advance(self) -> None:
        """The next step takes one token of each sequence, and can be repeated."""
        step, n = self.step, self.slots.size
        if step.ids.size != n:
            raise ShapeError("a batch of several tokens each is followed by a new one")
        self._longest += 1
        if self._longest > self.kv.capacity:
            raise ConfigError(
                f"the KV cache holds {self.kv.capacity} tokens of a sequence and they are used up"
            )
        step.position += 1
        step.rows += 1
        step.seqs.k_len[:] += 1
        if self._longest > self._covered:
            step.rotations = self.model.rope.rotations(step.seqs, step.position)
            self._covered = self.model.rope.covers(self._longest)
            step.changed()


def _apart(seqs: Seqs, spans: np.ndarray | None) -> Seqs:
    """Sequences as the rotations take them: each token by itself where its length is given."""
    if spans is None:
        return seqs
    return Seqs(np.arange(spans.size + 1, dtype=np.int64), np.zeros_like(spans), spans)
