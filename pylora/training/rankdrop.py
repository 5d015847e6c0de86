"""Rank dropout: a step trains without some of each module's ranks, drawn anew for every step.

As kohya's trainer and LyCORIS have it (`rank_dropout`): a rank that is dropped adds nothing to the
module's output in this step, those that are kept count 1 / (1 - p) times as much, and neither
changes what is expected of it. One draw for a module and a step, whatever its micro-batches and
processes: a rank j is kept if word j of the stream "rank/<module path>/<step>" is >= p * 2^32
(docs/random.md). The rows of A are multiplied in place and brought back, bit for bit, after the
step's gradients; no model knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from pylora.numbers.philox import philox
from pylora.numbers.random import stream
from pylora.types import Array


def factors(p: float, ranks: int, path: str, *, seed: int, step: int) -> np.ndarray:
    """What each of a module's ranks is multiplied by in a step, float32 [ranks]: 0 or 1/(1 - p)."""
    words = philox(seed, stream("rank", path, str(step)), 0, ranks)
    low, keep = np.float32(p), np.float32(1) / (np.float32(1) - np.float32(p))
    kept: np.ndarray = np.where(words >= int(float(low) * 2**32), keep, np.float32(0))
    return kept.astype(np.float32)


class RankDropout:
    """The rank dropout of one step, of the arrays that are trained, by "<module path>.A"."""

    def __init__(
        self, p: float, parameters: Mapping[str, Array], held: Mapping[str, int],
        *, seed: int, step: int, xp: Any,
    ) -> None:  # fmt: skip
        """`held`: of each module the ranks that nothing moves, behind the others: never dropped."""
        self._arrays: dict[str, tuple[Array, Array]] = {}
        for name, array in parameters.items() if p else ():
            path, _, field = name.rpartition(".")
            if field == "A" and array.ndim == 2:
                found = factors(p, array.shape[0], path, seed=seed, step=step)
                found[held.get(path, len(found)) :] = 1
                self._arrays[name] = array, xp.asarray(found)[:, None]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """A as this step has it; afterwards as it was, however the block ends."""
        before = {name: array.copy() for name, (array, _) in self._arrays.items()}
        try:
            for array, factor in self._arrays.values():
                array *= factor
            yield
        finally:
            for name, (array, _) in self._arrays.items():
                array[...] = before[name]

    def through(self, grads: Mapping[str, Array]) -> None:
        """Makes gradients of the multiplied A those of A itself, in place."""
        for name, (_, factor) in self._arrays.items():
            grads[name][...] *= factor
