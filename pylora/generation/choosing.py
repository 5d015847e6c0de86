"""What comes next in each of several answers, by their logits.

A `Chooser` is one answer: its settings, its random stream, what has been said. What it takes does
not depend on the answers beside it. Answers that take the likeliest token as it is are chosen
together; a GPU's logits come to the host only where another one needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.errors import PyloraError
from pylora.generation.sampling import Sampling, greedy
from pylora.numbers import random

_AHEAD = 32  # random numbers that are drawn at a time


class Chooser:
    """One answer to `prompt`, drawn from the stream of (seed, row, position)."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, seed: int, row: int) -> None:
        self.sampling, self.seed = sampling, seed
        self.plain = sampling.plain
        self._at = len(prompt)  # the position of the token that is chosen next
        self._stream = random.stream("sample", str(row)) if sampling.temperature else 0
        self._drawn: list[float] = []  # the numbers of the positions from _at on, the last first
        seen = sampling.repetition_penalty != 1
        self._seen: set[int] | None = {int(token) for token in prompt} if seen else None
        self._counts: dict[int, int] | None = {} if sampling.counts else None

    def choose(self, logits: np.ndarray, allowed: np.ndarray | None = None) -> int:
        """The next token by logits [vocab]; `allowed`: see `Sampling.choose`. It is not taken."""
        u = 0.5
        if self.sampling.temperature:
            if not self._drawn:
                drawn = random.unit(self.seed, self._stream, self._at, _AHEAD)
                self._drawn = drawn[::-1].tolist()
            u = self._drawn[-1]
        return self.sampling.choose(logits, u, self._seen or (), self._counts, allowed)

    def take(self, token: int) -> None:
        """Adds a token to the answer."""
        self._at += 1
        if self._drawn:
            self._drawn.pop()
        if self._seen is not None:
            self._seen.add(token)
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1


def choose(ops: Any, logits: Any, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each answer by its row of logits [n, vocab]. PyloraError where logits are
    not finite."""
    if all(chooser.plain for chooser in choosers):
        return greedy(logits)
    rows = ops.to_numpy(logits)
    return [chooser.choose(row) for chooser, row in zip(choosers, rows, strict=True)]


def likeliest(rows: np.ndarray) -> list[int | PyloraError]:
    """The likeliest token of each row [n, vocab], the lowest id of equals; an error in the place of
    a row that is not finite, whatever the others are."""
    try:
        return list(greedy(rows))
    except PyloraError:
        return [_one(row) for row in rows]


def _one(row: np.ndarray) -> int | PyloraError:
    try:
        return greedy(row[None])[0]
    except PyloraError as error:
        return error
