"""What the study of learning task after task trains on: small functions of a row of digits.

A record is  BOS, the task's own token, six digits, SEP, six answers.  The base is made from scratch
on four skills; then come five tasks that it has never seen, one after the other. Each task has a
token of its own, so that one network could in principle know them all: what a method forgets is its
own doing, and not that two tasks ask for different answers to the same question.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pylora.model.config import LlamaConfig
from pylora.types import Seqs

DIGITS, LENGTH = 10, 6
Function = Callable[[np.ndarray], np.ndarray]  # [n, LENGTH] -> [n, LENGTH]

SKILLS: dict[str, Function] = {  # what the base can do: "its other abilities"
    "copy": lambda x: x,
    "rotate": lambda x: np.roll(x, -1, axis=1),
    "add 3": lambda x: (x + 3) % DIGITS,
    "first": lambda x: np.repeat(x[:, :1], LENGTH, axis=1),
}
TASKS: dict[str, Function] = {  # what is learned afterwards, in this order
    "reverse": lambda x: x[:, ::-1],
    "complement": lambda x: DIGITS - 1 - x,
    "swap pairs": lambda x: x.reshape(-1, LENGTH // 2, 2)[:, :, ::-1].reshape(-1, LENGTH),
    "sort": lambda x: np.sort(x, axis=1),
    "running sum": lambda x: np.cumsum(x, axis=1) % DIGITS,
}
ALL = SKILLS | TASKS
TOKEN = {name: DIGITS + i for i, name in enumerate(ALL)}
SEP, BOS = DIGITS + len(ALL), DIGITS + len(ALL) + 1
ROW = 2 + LENGTH + 1 + LENGTH - 1  # tokens that are read: the last answer is only predicted
ANSWERS = np.arange(2 + LENGTH, ROW)  # the rows that predict an answer

CONFIG = LlamaConfig.tiny(
    vocab_size=BOS + 1,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    head_dim=16,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


@dataclass(frozen=True)
class Records:
    """Some records of one task or of several. `ids` int64 [n, ROW], `answers` int64 [n, LENGTH]."""

    ids: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: np.ndarray) -> Records:
        """Those of the given numbers."""
        return Records(self.ids[chosen], self.answers[chosen])

    @property
    def seqs(self) -> Seqs:
        """Where each begins, laid out one behind the other."""
        return Seqs.of([ROW] * len(self))

    @property
    def rows(self) -> np.ndarray:
        """int64 [n * LENGTH]: the rows of that layout that predict an answer."""
        return (np.arange(len(self))[:, None] * ROW + ANSWERS).reshape(-1)

    @property
    def nbytes(self) -> int:
        """What keeping them costs: a byte a token."""
        return int(self.ids.size + len(self))


def records(name: str, n: int, seed: int, split: str) -> Records:
    """n records of one task or skill; those of two splits ("train", "test") are drawn apart."""
    key = [seed, TOKEN[name], {"train": 0, "test": 1}[split]]
    x = np.random.default_rng(key).integers(0, DIGITS, (n, LENGTH))
    # The last digit's parity tells the splits apart, so that no test record was trained on.
    x[:, -1] = x[:, -1] // 2 * 2 + (x[:, :-1].sum(axis=1) + (split == "test")) % 2
    y = ALL[name](x)
    head = np.tile([BOS, TOKEN[name]], (n, 1))
    ids = np.concatenate([head, x, np.full((n, 1), SEP), y[:, :-1]], axis=1)
    return Records(ids, y)


def joined(parts: list[Records]) -> Records:
    """All of them as one."""
    return Records(
        np.concatenate([p.ids for p in parts]), np.concatenate([p.answers for p in parts])
    )
