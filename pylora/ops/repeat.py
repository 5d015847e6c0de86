"""Work that comes again with other numbers, such as a training step.

`Backend.repeated()` gives an object with the methods of `Repeated`, for one model. `Direct` is its
reference: it runs what it is given. A GPU's backend may record the work and
replay it (cuda/steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np

from pylora.types import Array, Seqs

Results = dict[Any, Array]  # by any name
Work = Callable[[Sequence[Array], Seqs], Results]


class Repeated(Protocol):
    """What `Backend.repeated` returns."""

    def run(self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        """work(arrays, seqs), the host's arrays placed where the backend computes.

        Two calls of one key may differ in the numbers in `arrays` and `seqs` alone: what else the
        work depends on is part of the key, objects by identity. None: it is run, never replayed.
        Work that has a key uses the backend's operations on its arrays and nothing else, and may
        not look at a number of theirs. The results belong to the caller.
        """

    def clear(self) -> None:
        """Lets go of everything that is kept."""


class Direct:
    """`Repeated` that keeps nothing."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def run(self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        return work([self.ops.xp.asarray(a) for a in arrays], seqs)

    def clear(self) -> None:
        pass
