"""What preferences are about: an answer to a prompt, two of them, or one with a verdict.

An `Answer` is tokens and nothing else; what is in a file's record is in preference_records.py, what
a loss makes of it in likelihood.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pylora.errors import DataError
from pylora.reference import IGNORE
from pylora.training.examples import Example
from pylora.types import brief


@dataclass(frozen=True, eq=False)
class Answer:
    """A prompt and one answer to it. Row i sees ids[:i + 1] and must predict targets[i]; the answer
    is the rows of which `counted` is true."""

    __repr__ = brief

    ids: np.ndarray  # int64 [n]
    targets: np.ndarray  # int64 [n], the next token of each row
    counted: np.ndarray  # bool [n]
    where: str = "answer"

    @classmethod
    def of(cls, tokens: Sequence[int], counted: Sequence[bool], where: str = "answer") -> Answer:
        """From n + 1 tokens and whether each belongs to the answer; see `Example.of`."""
        example = Example.of(tokens, counted, where)
        targets = np.asarray(tokens, np.int64)[1 : len(example) + 1].copy()
        return cls(example.ids, targets, example.labels != IGNORE, where)

    def __len__(self) -> int:
        return int(self.ids.size)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]: targets where they count, IGNORE (-100) elsewhere."""
        return np.where(self.counted, self.targets, IGNORE)

    @cached_property
    def count(self) -> int:
        """Tokens of the answer."""
        return int(self.counted.sum())

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the tokens and of which count."""
        h = hashlib.sha256(np.ascontiguousarray(self.ids, "<i8").tobytes())
        h.update(np.ascontiguousarray(self.targets, "<i8").tobytes())
        h.update(np.ascontiguousarray(self.counted, "u1").tobytes())
        return h.hexdigest()

    def logp(self, nll: np.ndarray) -> float:
        """log p(answer | prompt) from the nll [n] of the rows; the sum is rounded once, so that it
        depends on nothing else that is computed."""
        return -math.fsum(nll[self.counted].tolist())

    def spread(self, slope: float) -> np.ndarray:
        """dL/dnll [n] of the rows, where dL/dlogp is `slope`."""
        return np.where(self.counted, -slope, 0.0)


@dataclass(frozen=True, eq=False)
class Preference:
    """Two answers to one prompt, of which the first is better."""

    chosen: Answer
    rejected: Answer
    where: str = "preference"

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def __repr__(self) -> str:
        return (
            f"Preference({self.where}: {self.chosen.count} tokens over {self.rejected.count}, "
            f"behind {len(self.chosen) + 1 - self.chosen.count})"
        )

    @property
    def answers(self) -> tuple[Answer, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, eq=False)
class Verdict:
    """An answer that is desirable or is not; and `other`, the same prompt with the answer of
    another record, which is never trained on: what KTO estimates its reference point from."""

    answer: Answer
    other: Answer
    desirable: bool
    where: str = "verdict"

    def __len__(self) -> int:
        return len(self.answer)

    def __repr__(self) -> str:
        kind = "desirable" if self.desirable else "undesirable"
        return f"Verdict({self.where}: {kind}, {self.answer.count} tokens)"

    @property
    def answers(self) -> tuple[Answer, ...]:
        return (self.answer,)


Item = Preference | Verdict


def digest(items: Sequence[Item]) -> str:
    """sha256 (hex) of the items, in order; where they came from does not count."""
    h = hashlib.sha256()
    for item in items:
        for answer in item.answers:
            h.update(answer.digest.encode())
        if isinstance(item, Verdict):
            h.update(f"{item.other.digest} {item.desirable}".encode())
    return h.hexdigest()


def check(items: Sequence[Item], config: object, what: str, max_tokens: int | None = None) -> None:
    """DataError for items that a model of this configuration cannot take; see `check_examples`."""
    from pylora.training.examples import check_examples

    if not items:
        raise DataError(f"there are no {what} records")
    for item in items:
        others = (item.other,) if isinstance(item, Verdict) else ()
        for answer in (*item.answers, *others):
            example = Example(answer.ids, answer.targets, answer.where)
            check_examples([example], config, what)  # type: ignore[arg-type]
            if not answer.count:
                raise DataError(f"{answer.where}: the answer has no token")
        if max_tokens is not None and len(item) > max_tokens:
            raise DataError(
                f"{item.where}: {len(item)} tokens in all, more than max_tokens {max_tokens}; "
                "raise max_tokens"
            )
