"""The angles of rotary position embedding (Su et al., "RoFormer", 2021), as tables of cos and sin.

The rotation itself is an operation of the backend (`rope`). Tables are computed in float64 and
rounded once to the model's dtype; they grow when a later position is asked for, and the bits of a
position do not depend on how far the table reaches.

A layer has one of a few kinds of tables (`LlamaConfig.rope_of`): Gemma's local layers have a base
of their own. Where the frequencies depend on how long the sequence is (dynamic, longrope) each
sequence has its own, whatever lies beside it; keys that were stored before it grew longer stay as
they were, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pylora.errors import ConfigError
from pylora.model.config import LlamaConfig
from pylora.model.frequencies import attention_factor, inverse_frequencies
from pylora.ops.protocol import Backend
from pylora.types import Array, Rotation, Seqs

__all__ = ["Rope", "inverse_frequencies"]

_BY_LENGTH = ("dynamic", "longrope")


class _Kind:
    """One kind of tables: frequencies that are the same for all sequences, or by their length."""

    def __init__(
        self,
        config: LlamaConfig,
        theta: float,
        scaling: Mapping[str, Any] | None,
        dtype: Any,
        ops: Any,
    ) -> None:
        self._config, self._theta, self._scaling = config, theta, scaling
        self._dtype, self._ops = dtype, ops
        self.by_length = scaling is not None and scaling["rope_type"] in _BY_LENGTH
        self._factor = attention_factor(scaling)
        self._first = self._frequency(0)
        self._pair = self._make(min(256, config.max_positions))
        self._older: list[Any] = []  # graphs of a GPU may read them as long as the model lives

    def _frequency(self, length: int) -> np.ndarray:
        c = self._config
        return inverse_frequencies(
            c.rotary_dim, self._theta, self._scaling,
            length=length, trained=c.max_position_embeddings,
        )  # fmt: skip

    def _pair_of(self, angle: np.ndarray) -> tuple[Array, Array]:
        cos, sin = np.cos(angle), np.sin(angle)
        if self._factor != 1:
            cos, sin = cos * self._factor, sin * self._factor
        return tuple(self._ops.asarray(t.astype(self._dtype)) for t in (cos, sin))

    def _make(self, n: int) -> tuple[Array, Array]:
        return self._pair_of(np.arange(n, dtype=np.float64)[:, None] * self._first)

    def tables(self, positions: int) -> tuple[Array, Array]:
        """Of a short sequence, that cover at least so many positions."""
        pair = self._pair  # read once: another thread may put a longer or a shorter one there
        if positions > (size := pair[0].shape[0]):
            self._older.append(pair)
            most = self._config.max_positions
            pair = self._pair = self._make(min(max(positions, 2 * size), most))
        return pair

    @property
    def unchanged(self) -> int:
        """The longest sequence whose frequencies are those of a short one."""
        if not self.by_length or self._scaling is None:
            return self._config.max_positions
        if self._scaling["rope_type"] == "longrope":
            return int(self._scaling["original_max_position_embeddings"])
        return self._config.max_position_embeddings

    def changed(self, length: int) -> bool:
        return length > self.unchanged

    def rows(self, lengths: np.ndarray, position: np.ndarray) -> tuple[Array, Array]:
        """A row of cos and sin for each token, of a sequence of length lengths[i]."""
        angle = np.empty((position.size, self._first.size))
        for n in np.unique(lengths).tolist():
            frequency = self._frequency(n) if self.changed(n) else self._first
            here = lengths == n
            angle[here] = position[here].astype(np.float64)[:, None] * frequency
        return self._pair_of(angle)


class Rope:
    """Tables of cos and sin [positions, rotated / 2] for a model's positions; all layers share
    them, and threads may: a longer pair takes the place of the older one at once."""

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, *, ops: Backend) -> None:
        self.max_positions = config.max_positions
        self._layout, self._head_dim, self._ops = config.rope_layout, config.head_dim, ops
        self.kinds: list[_Kind] = []
        if config.rotated:
            self.kinds.append(_Kind(config, config.rope_theta, config.rope_scaling, dtype, ops))
        if config.ropes is not None and 1 in config.ropes:
            theta = config.local_rope_theta or config.rope_theta
            self.kinds.append(_Kind(config, theta, config.local_rope_scaling, dtype, ops))

    @property
    def by_length(self) -> bool:
        """Whether a sequence's rotation depends on its length."""
        return any(kind.by_length for kind in self.kinds)

    @property
    def unchanged(self) -> int:
        """The longest sequence that is rotated as a short one is."""
        return min((kind.unchanged for kind in self.kinds), default=self.max_positions)

    def tables(self, positions: int) -> tuple[Array, Array]:
        """(cos, sin) of the first kind that cover at least this many positions. ConfigError beyond
        the model's."""
        self._check(positions)
        return self.kinds[0].tables(positions)

    def covers(self, positions: int) -> int:
        """Up to which length the tables that `rotations` gives for a sequence so long serve it, as
        it grows: 0 where each step has its own."""
        reach = []
        for kind in self.kinds:
            if kind.changed(positions):
                return 0
            last = kind.unchanged
            reach.append(min(kind.tables(positions)[0].shape[0], last))
        return min(reach, default=self.max_positions)

    def _check(self, positions: int) -> None:
        if positions > self.max_positions:
            raise ConfigError(
                f"a sequence of {positions} tokens is longer than the model's "
                f"max_position_embeddings ({self.max_positions}); shorten it"
            )

    def rotations(self, seqs: Seqs, position: Array) -> tuple[Rotation, ...]:
        """Of each kind, for tokens at `position` [m] in `seqs`. ConfigError beyond the model's."""
        longest = int(seqs.k_len.max(initial=0))
        self._check(longest)
        return tuple(self._rotation(kind, seqs, position, longest) for kind in self.kinds)

    def _rotation(self, kind: _Kind, seqs: Seqs, position: Array, longest: int) -> Rotation:
        if not kind.changed(longest):
            cos, sin = kind.tables(longest)
            return Rotation(cos, sin, position, self._head_dim, self._layout)
        lengths = np.repeat(seqs.k_len, np.diff(seqs.q_start))
        cos, sin = kind.rows(lengths, np.asarray(self._ops.to_numpy(position)))
        each = self._ops.xp.arange(lengths.size, dtype=np.int64)
        return Rotation(cos, sin, each, self._head_dim, self._layout)
