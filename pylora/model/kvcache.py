"""Keys and values of the tokens seen so far, so that a new token costs one row.

One array per layer, [rows, kv_heads * head_dim], of the dtype of the model's activations: half the
bytes in bf16. A slot holds one sequence in rows that lie side by side; it can be cleared and given
to another at any time, and the others do not notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.errors import ConfigError, ShapeError, expect
from pylora.model.config import LlamaConfig
from pylora.ops.llama import Runs
from pylora.ops.protocol import Backend
from pylora.types import Seqs


class KVCache:
    """Room for `slots` sequences of up to `capacity` tokens each.

    Slot i has the rows from start[i] on, and room[i] of them.
    """

    def __init__(
        self,
        config: LlamaConfig,
        slots: int,
        capacity: int,
        *,
        ops: Backend,
        dtype: Any = np.float32,
        rows: int | None = None,
    ) -> None:
        """`rows`: so many in all, and no slot has one until its owner says which (`start`, `room`);
        None: each slot has its own `capacity` rows.

        Raises ConfigError where the capacity is beyond the model's max_position_embeddings.
        """
        expect("model configuration", config, "KVCache(config, slots, capacity)")
        whole = all(hasattr(n, "__index__") for n in (slots, capacity))
        if not whole or slots < 1 or capacity < 1:
            raise ConfigError(
                f"a KV cache needs slots and capacity >= 1, got {slots!r}, {capacity!r}"
            )
        if capacity > config.max_positions:
            raise ConfigError(
                f"a sequence of {capacity} tokens is longer than the model's "
                f"max_position_embeddings ({config.max_positions}); shorten the prompt "
                "or ask for fewer new tokens"
            )
        self.slots, self.capacity = slots, capacity
        self.length = np.zeros(slots, np.int64)  # tokens stored in each slot
        each = capacity if rows is None else 0
        self.start = np.arange(slots, dtype=np.int64) * each
        self.room = np.full(slots, each, np.int64)
        shape = (slots * capacity if rows is None else rows, config.kv_size)
        layers = range(config.num_hidden_layers)
        self.k = [ops.empty(shape, dtype) for _ in layers]
        self.v = [ops.empty(shape, dtype) for _ in layers]
        self._handle: tuple[Runs, Any] | None = None

    def __repr__(self) -> str:
        return (
            f"KVCache({self.slots} slots of {self.capacity} tokens, {len(self.k)} layers, "
            f"{int(self.length.sum())} tokens stored)"
        )

    def handle(self, op: Runs) -> Any:
        """The cache as the backend's operation takes it."""
        if self._handle is None or self._handle[0] is not op:
            self._handle = op, op.cache(self.k, self.v)
        return self._handle[1]

    def clear(self, slot: int) -> None:
        """Forgets what the slot holds."""
        self.length[slot] = 0

    def place(self, lengths: Sequence[int], slots: np.ndarray) -> tuple[Seqs, np.ndarray]:
        """Where lengths[i] new tokens of slot slots[i] go: (Seqs, cache rows [m]).

        Stores nothing yet. ConfigError where a slot is too full, ShapeError for bad arguments.
        """
        n = np.asarray(lengths, np.int64).reshape(-1)
        known = slots.size == 0 or (slots.min() >= 0 and slots.max() < self.slots)
        if n.shape != slots.shape or not known or np.unique(slots).size != slots.size:
            raise ShapeError(
                f"{n.size} lengths for the slots {slots.tolist()} of a cache of {self.slots}: "
                "give one length to each slot, and each slot once"
            )
        if (n < 1).any():
            raise ShapeError(f"each sequence needs at least one new token, got {n.tolist()}")
        total = self.length[slots] + n
        room = self.room[slots]
        if (total > room).any():
            i = int(np.argmax(total - room))
            raise ConfigError(
                f"slot {int(slots[i])} of the KV cache would hold {int(total[i])} tokens, its "
                f"capacity is {int(room[i])}"
            )
        q_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(n)])
        k_start = self.start[slots]
        seqs = Seqs(q_start, k_start, total)
        offset = np.repeat(k_start + self.length[slots] - q_start[:-1], n)
        return seqs, np.arange(int(q_start[-1]), dtype=np.int64) + offset
