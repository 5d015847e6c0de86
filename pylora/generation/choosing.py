"""What comes next in each of several answers, by their logits.

A `Chooser` is one answer: its settings, its random stream, what has been said. `pick` chooses for
all of a batch in one call of the C core; what an answer takes does not depend on those beside it.
Where there is no C core, and for logits in float64, each row is chosen from by `Sampling.choose`. A
GPU's logits come to the host only where an answer needs more than the likeliest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.errors import PyloraError
from pylora.generation.core import core_for
from pylora.generation.sampling import Sampling, greedy, not_finite
from pylora.numbers import random

_AHEAD = 32  # random numbers that are drawn at a time
_MOST_K = 1 << 31  # more tokens than any vocabulary has

Words = np.ndarray  # uint32 [words]: bit i % 32 of word i // 32 says whether token i may come
Picked = int | PyloraError | None  # None: no token may come


class Said:
    """The distinct tokens of a text, and how often it has each."""

    def __init__(self, text: Sequence[int] = ()) -> None:
        ids, often = np.unique(np.asarray(text, np.int64), return_counts=True)
        self.at = {token: i for i, token in enumerate(ids.tolist())}
        self._ids = np.resize(ids, 2 * ids.size + 32)
        self._often = np.zeros(self._ids.size, np.float32)
        self._often[: ids.size] = often

    def add(self, token: int) -> None:
        """One more."""
        i = self.at.setdefault(token, len(self.at))
        if i == self._ids.size:
            self._ids, self._often = np.resize(self._ids, 2 * i), np.resize(self._often, 2 * i)
            self._often[i:] = 0
        self._ids[i] = token
        self._often[i] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct]."""
        return self._ids[: len(self.at)]

    @property
    def often(self) -> np.ndarray:
        """float32 [distinct]."""
        return self._often[: len(self.at)]


class Chooser:
    """One answer to `prompt`, drawn from the stream of (seed, row, position)."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, seed: int, row: int) -> None:
        self.sampling, self.seed = sampling, seed
        self.plain = sampling.plain
        self._at = len(prompt)  # the position of the token that is chosen next
        self._stream = random.stream("sample", str(row)) if sampling.temperature else 0
        self._drawn: list[float] = []  # the numbers of the positions from _at on, the last first
        repeats = sampling.repetition_penalty != 1
        self.seen: Said | None = Said(prompt) if repeats else None
        self.answer: Said | None = Said() if sampling.counts else None
        s = sampling
        self.settings = float(s.temperature), float(s.top_p), float(s.min_p)
        self.top_k = min(int(s.top_k), _MOST_K)

    @property
    def u(self) -> float:
        """The number that decides which token is next; any, where nothing is drawn."""
        if not self.sampling.temperature:
            return 0.5
        if not self._drawn:
            drawn = random.unit(self.seed, self._stream, self._at, _AHEAD)
            self._drawn = drawn[::-1].tolist()
        return self._drawn[-1]

    def choose(self, logits: np.ndarray) -> int:
        """The next token by logits [vocab]. It is not taken."""
        return _token(pick(logits[None], [self])[0])

    def take(self, token: int) -> None:
        """Adds a token to the answer."""
        self._at += 1
        if self._drawn:
            self._drawn.pop()
        if self.seen is not None:
            self.seen.add(token)
        if self.answer is not None:
            self.answer.add(token)


def pick(
    logits: np.ndarray, choosers: Sequence[Chooser], allowed: Sequence[Words | None] = ()
) -> list[Picked]:
    """The next token of each answer by its row of logits [n, vocab]; an error in the place of a row
    that is not finite, None where none may come. `allowed`: the tokens that may, for each answer,
    or nothing. The logits are what they were when this returns."""
    core = core_for(logits)
    masks = allowed or [None] * len(choosers)
    if core is None:
        return [_alone(row, c, words) for row, c, words in zip(logits, choosers, masks)]
    how = np.array(
        [
            (*c.settings, c.u, c.top_k, *((0, 0) if w is None else (w.ctypes.data, w.size)))
            for c, w in zip(choosers, masks, strict=True)
        ],
        core.HOW,
    )
    changing = any(c.sampling.changes for c in choosers)
    if changing and not (logits.flags.c_contiguous and logits.flags.writeable):
        logits = np.array(logits)
    before = _change(logits, choosers) if changing else []
    tokens = core.sample(logits, how).tolist()
    flat = logits.reshape(-1) if before else logits
    for where, old in reversed(before):
        flat[where] = old
    if min(tokens, default=0) >= 0:
        found: list[Picked] = tokens
        return found
    return [t if t >= 0 else None if t == core.NOTHING else not_finite() for t in tokens]


def _change(logits: np.ndarray, choosers: Sequence[Chooser]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Adds biases and takes penalties, in float32, in the order of `Sampling`, all rows at once.
    (places, what was there), the latest last, by which it is undone."""
    biases, repeats, counts = _Places(), _Places(), _Places()
    for i, c in enumerate(choosers):
        s, start = c.sampling, i * logits.shape[1]
        if s.logit_bias:
            tokens, values = zip(*s.logit_bias)
            biases.add(start, np.array(tokens, np.int64), np.array(values, np.float32))
        if c.seen is not None:
            ids = c.seen.ids
            repeats.add(start, ids, np.full(ids.size, s.repetition_penalty, np.float32))
        if c.answer is not None and c.answer.at:
            by = s.presence_penalty + c.answer.often * s.frequency_penalty
            counts.add(start, c.answer.ids, by)
    flat, before = logits.reshape(-1), []
    for kind in (biases, repeats, counts):
        if not kind.where:
            continue
        where, by = np.concatenate(kind.where), np.concatenate(kind.by)
        old = flat[where]
        before.append((where, old))
        if kind is biases:
            flat[where] = old + by
        elif kind is repeats:
            flat[where] = np.where(old > 0, old / by, old * by)
        else:
            flat[where] = old - by
    return before


class _Places:
    """Where numbers change, as one array, and by what."""

    def __init__(self) -> None:
        self.where: list[np.ndarray] = []
        self.by: list[np.ndarray] = []

    def add(self, start: int, tokens: np.ndarray, by: np.ndarray) -> None:
        """Tokens of the row that begins at `start`."""
        self.where.append(tokens + start)
        self.by.append(by)


def _alone(row: np.ndarray, c: Chooser, words: Words | None) -> Picked:
    """The same by NumPy."""
    allowed = None
    if words is not None:
        bits = np.unpackbits(words.astype("<u4", copy=False).view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[: row.size])
        if not allowed.size:
            return None
    counts = {}
    if c.answer is not None:
        counts = dict(zip(c.answer.ids.tolist(), c.answer.often.tolist()))
    try:
        return c.sampling.choose(row, c.u, () if c.seen is None else c.seen.at, counts, allowed)
    except PyloraError as error:
        return error


def choose(ops: Any, logits: Any, choosers: Sequence[Chooser]) -> list[int]:
    """The next token of each answer by its row of logits [n, vocab]. PyloraError where logits are
    not finite."""
    if not isinstance(logits, np.ndarray) and all(chooser.plain for chooser in choosers):
        return greedy(logits)
    return [_token(found) for found in pick(ops.to_numpy(logits), choosers)]


def _token(found: Picked) -> int:
    if isinstance(found, PyloraError):
        raise found
    assert found is not None  # nothing was forbidden
    return found


def likeliest(rows: Any) -> list[Picked]:
    """The likeliest token of each row [n, vocab], the lowest id of equals; an error in the place of
    a row that is not finite, whatever the others are."""
    if isinstance(rows, np.ndarray):
        return pick(rows, [_PLAIN] * len(rows))
    try:
        return list(greedy(rows))
    except PyloraError:
        return [_one(row) for row in rows]


def _one(row: Any) -> Picked:
    try:
        return greedy(row[None])[0]
    except PyloraError as error:
        return error


_PLAIN = Chooser([], Sampling(), 0, 0)
