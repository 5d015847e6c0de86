"""The angles of rotary position embedding (Su et al., "RoFormer", 2021), as tables of cos and sin.

The rotation itself is an operation of the backend (`rope`). Tables are computed in float64 and
rounded once to the model's dtype; they grow when a later position is asked for, and the bits of a
position do not depend on how far the table reaches.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.errors import ConfigError
from pylora.model.config import LlamaConfig
from pylora.ops.protocol import Backend
from pylora.types import Array


def inverse_frequencies(
    head_dim: int, theta: float, scaling: dict[str, Any] | None = None
) -> np.ndarray:
    """Radians per position of each pair of a head, float64 [head_dim / 2]: theta^(-2i / head_dim).

    `scaling` stretches them: {"rope_type": "linear", "factor"} divides all by the factor;
    "llama3" (Llama 3.1) divides the long wavelengths, keeps the short ones, and blends between.
    """
    # Python's power is the C library's, as in csrc/files/rope.c; NumPy's has another last bit on
    # some processors.
    powers = [float(theta) ** (-i / head_dim) for i in range(0, head_dim, 2)]
    frequency = np.array(powers, np.float64)
    if scaling is None:
        return frequency
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequency / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)  # 0: stretched, 1: left as it is
    frequency *= (1 - blend) / factor + blend
    return frequency


class Rope:
    """Tables of cos and sin [positions, head_dim / 2] for a model's positions; all layers
    share them, and threads may: a longer pair takes the place of the older one at once."""

    def __init__(self, config: LlamaConfig, dtype: Any = np.float32, *, ops: Backend) -> None:
        self.max_positions = config.max_position_embeddings
        self._frequency = inverse_frequencies(
            config.head_dim, config.rope_theta, config.rope_scaling
        )
        self._dtype, self._ops = dtype, ops
        self._pair = self._make(min(256, self.max_positions))
        self._older: list[Any] = []  # graphs of a GPU may read them as long as the model lives

    def _make(self, n: int) -> tuple[Array, Array]:
        angle = np.arange(n, dtype=np.float64)[:, None] * self._frequency
        cos, sin = (self._ops.asarray(f(angle).astype(self._dtype)) for f in (np.cos, np.sin))
        return cos, sin

    def tables(self, positions: int) -> tuple[Array, Array]:
        """(cos, sin) that cover at least this many positions. ConfigError beyond the model's."""
        if positions > self.max_positions:
            raise ConfigError(
                f"a sequence of {positions} tokens is longer than the model's "
                f"max_position_embeddings ({self.max_positions}); shorten it"
            )
        pair = self._pair  # read once: another thread may put a longer or a shorter one there
        if positions > (size := pair[0].shape[0]):
            self._older.append(pair)
            pair = self._pair = self._make(min(max(positions, 2 * size), self.max_positions))
        return pair
