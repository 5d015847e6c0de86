"""The numbers of one call: drawn from a seed and the sizes, in any dtype.

Sums of the whole ones are exact; the others are well conditioned, so that what is wrong is wrong by
more than any rounding. What is called with them is in problems/every.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from pylora.conformance.problems.layers import np_dtype
from pylora.types import Array


class Numbers:
    """Draws the arguments of one call."""

    def __init__(self, seed: int, dtype: str, sizes: Mapping[str, int]) -> None:
        self.rng, self.seed = np.random.default_rng([seed, *sizes.values()]), seed
        self.dtype: Any = np.dtype(np_dtype(dtype))
        self.n = SimpleNamespace(**sizes)

    def whole(self, *shape: int) -> Array:
        """Small integers, none of them zero."""
        a = self.rng.integers(1, 3, shape) * self.rng.choice((-1, 1), shape)
        return a.astype(self.dtype)

    def real(self, *shape: int) -> Array:
        """Of either sign and about 1 in size: nothing cancels to nearly nothing."""
        a = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice((-1, 1), shape)
        return a.astype(self.dtype)

    def positive(self, *shape: int) -> Array:
        return self.rng.uniform(0.5, 1.5, shape).astype(self.dtype)

    def heavy(self, m: int, n: int) -> Array:
        """Rows whose sums hang on their ends and their middle, however long they are."""
        a = self.real(m, n).astype(np.float64)
        a[:, [0, n // 2, n - 1]] *= max(1.0, np.sqrt(n) / 4)
        return a.astype(self.dtype)

    def matrix(self, d: int, k: int) -> Array:
        """As a projection's weights: results about as large as what goes in."""
        return (self.real(d, k).astype(np.float64) / np.sqrt(k)).astype(self.dtype)

    def ids(self, m: int, vocab: int) -> Array:
        ids = self.rng.integers(0, vocab, m)
        if m:
            ids[-1] = vocab - 1
        if m > 1 and ids[0] == ids[-1]:  # read from the other end they are others
            ids[0] = 0
        return ids.astype(np.int64)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def option(self, *options: Any, step: int = 1) -> Any:
        """By the seed alone, so that seeds in a row have all of them."""
        return options[self.seed // step % len(options)]

    def scale(self) -> float:
        return float(self.pick(2.0, -1.0, 0.5))

    def rows(self, m: int, adapters: int) -> Array:
        """Whose each row is: all, and the last of them above all, where there are enough rows."""
        rows = self.rng.integers(-1, adapters, m)
        rows[-min(m, adapters) :] = np.arange(adapters)[-min(m, adapters) :]
        if m > 1 and rows[0] == rows[-1]:  # as with ids
            rows[0] = -1
        return rows.astype(np.int64)
