"""Log probabilities of tokens, by a row of logits: of one token, and of the likeliest.

They are of the model's own distribution, softmax(logits), before temperature, penalties or a bias.
The sum over the vocabulary has float32 terms and is added up in float64: an error near 1e-7 of a
logprob. A row is looked at alone, so its numbers do not depend on the rows beside it.
"""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 64  # logits in a group, of which only the largest is looked at first


class Logprobs:
    """Those of a row of logits [vocab], finite."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits
        most = logits.max()
        total = np.exp(logits - most).sum(dtype=np.float64)
        self._all = float(most) + math.log(float(total))

    def of(self, token: int) -> float:
        """The natural logarithm of a token's probability."""
        return float(self._logits[token]) - self._all

    def top(self, k: int) -> tuple[tuple[int, float], ...]:
        """The k likeliest tokens, equals by the lower id, each with its logprob."""
        return tuple((token, self.of(token)) for token in largest(self._logits, k).tolist())


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
