"""Log probabilities of tokens, by a row of logits: of one token, and of the likeliest.

They are of the model's own distribution, softmax(logits), before temperature, penalties or a bias.
The sum over the vocabulary has float32 terms and is added up in float64: an error near 1e-7 of a
logprob. A row is looked at alone, so its numbers do not depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pylora.generation.core import core_for

_BLOCK = 64  # logits in a group, of which only the largest is looked at first


class Logprobs:
    """Those of a row of logits [vocab], finite."""

    def __init__(self, logits: np.ndarray, known: tuple[float, np.ndarray] | None = None) -> None:
        """`known`: (log sum exp, the largest ones, largest first) if that was computed already."""
        self._logits = logits
        self._best = np.empty(0, np.int64)
        core = core_for(logits)
        if known is not None:
            self._all, self._best = known
            return
        if core is not None:
            self._all = float(core.likeliest(logits[None], np.zeros(1, np.int64))[0][0])
            return
        most = logits.max()
        total = np.exp(logits - most).sum(dtype=np.float64)
        self._all = float(most) + math.log(float(total))

    def of(self, token: int) -> float:
        """The natural logarithm of a token's probability."""
        return float(self._logits[token]) - self._all

    def top(self, k: int) -> tuple[tuple[int, float], ...]:
        """The k likeliest tokens, equals by the lower id, each with its logprob."""
        best = self._best[:k] if k <= self._best.size else largest(self._logits, k)
        values = self._logits[best].astype(np.float64) - self._all
        return tuple(zip(best.tolist(), values.tolist()))


def logprobs(rows: np.ndarray, counts: Sequence[int | None]) -> list[Logprobs | None]:
    """Those of each row of logits [n, vocab], with its counts[i] likeliest tokens at hand, in one
    call of the C core; None where counts[i] is None."""
    core = core_for(rows)
    if core is None:
        return [None if k is None else Logprobs(row) for row, k in zip(rows, counts, strict=True)]
    each = np.array([-1 if k is None else k for k in counts], np.int64)
    lse, best = core.likeliest(rows, each)
    return [
        None if k is None else Logprobs(row, (everything, some[:k]))
        for row, k, everything, some in zip(rows, counts, lse.tolist(), best, strict=True)
    ]


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest of `scores` [n] are, int64 [min(k, n)], largest first; of equals the
    first."""
    k = min(k, scores.size)
    if k < 1:
        return np.empty(0, np.int64)
    some = np.flatnonzero(scores >= _bound(scores, k))
    return some[np.argsort(-scores[some], kind="stable")][:k]


def _bound(scores: np.ndarray, k: int) -> np.floating:
    """A number that at least k of the scores reach, and not many more."""
    blocks = scores.size // _BLOCK
    if blocks < 2 * k:  # the k-th of all
        least: np.floating = np.partition(scores, scores.size - k)[scores.size - k]
        return least
    # The numbers of a group lie `blocks` apart, so that rows of them are compared at once. k groups
    # have a largest one that reaches the k-th of the largest ones.
    most = scores[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
    bound: np.floating = np.partition(most, blocks - k)[blocks - k]
    return bound
