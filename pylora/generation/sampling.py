"""Choosing one token from logits: greedy, or drawn by a number between 0 and 1.

Each setting has the name, the meaning and the order that transformers gives it: repetition
penalty, then temperature, top_k, top_p, min_p. Random numbers are drawn elsewhere
(pylora/numbers/random.py), so a choice is a function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError, PyloraError

_NOT_FINITE = (
    "the model's logits are not finite, so no token can be chosen; check the weights and the "
    "adapter for NaN or infinite values"
)
_UNLIKELY = 1e-5  # a token of a lower probability is ranked only where the others do not decide


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError, naming the setting, for a value out of range.

    temperature 0 takes the likeliest token (the lowest id of equals) and then top_k, top_p and
    min_p change nothing. repetition_penalty > 1 makes tokens of the prompt and the answer so far
    less likely: their logits are divided by it where positive, multiplied by it where negative.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep this many of the likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that have this share together
    min_p: float = 0.0  # keep those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high, text in (
            ("temperature", 0, math.inf, "0 (greedy) or positive"),
            ("top_p", 0, 1, "above 0 and at most 1"),
            ("min_p", 0, 1, "from 0 to 1"),
            ("repetition_penalty", 0, math.inf, "positive; 1 changes nothing"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.integer, np.floating))
            closed = name in ("temperature", "min_p")  # whose lower end is allowed
            if not number or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"{name} must be {text}, got {value!r:.100}")
            if not low <= value <= high or (value == low and not closed):
                raise ConfigError(f"{name} must be {text}, got {value}")
        whole_number("top_k", self.top_k, 0)

    @property
    def penalizes(self) -> bool:
        """Whether what was said before changes the choice."""
        return self.repetition_penalty != 1

    def choose(self, logits: np.ndarray, u: float, seen: Collection[int] = ()) -> int:
        """One token from logits [vocab], a number 0 < u < 1, and the tokens before it."""
        if self.penalizes:
            logits = penalized(logits, seen, self.repetition_penalty)
        if self.temperature == 0:
            return greedy(logits[None])[0]
        return sample(logits, u, self.temperature, self.top_k, self.top_p, self.min_p)


def whole_number(name: str, value: Any, least: int) -> None:
    """ConfigError unless `value` is a whole number from `least` on."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least:
        raise ConfigError(f"{name} must be a whole number from {least} on, got {value!r:.100}")


def sample(
    logits: np.ndarray,
    u: float,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One token from logits [vocab] and a number 0 < u < 1, in float64.

    p = softmax(logits / temperature). Tokens are ranked by p, equals by the lower id. top_k > 0
    keeps the first top_k. top_p < 1 then keeps the shortest run of the first whose share of what
    top_k left is at least top_p; at least one stays. min_p > 0 then keeps those whose p is at least
    min_p times the first's. The token is the first, in ranked order, at which the running sum of p
    exceeds u times the sum of all that stayed.
    """
    check_finite(logits)
    scores = np.asarray(logits, np.float64)
    if 0 < top_k < scores.size:
        least = np.partition(scores, -top_k)[-top_k]
        ranked = _ranked(scores, np.flatnonzero(scores >= least))[:top_k]
        whole = None
    else:  # the likely ones alone are ranked first: they nearly always decide
        p = np.exp((scores - scores.max()) / temperature)
        whole = float(p.sum())
        ranked = _ranked(scores, np.flatnonzero(p > whole * _UNLIKELY))
    while True:
        p = np.exp((scores[ranked] - scores[ranked[0]]) / temperature)  # of the first: 1
        total = np.cumsum(p)
        mass = float(total[-1]) if whole is None or ranked.size == scores.size else whole
        kept, enough = ranked.size, bool(total[-1] > u * mass)
        if top_p < 1:
            enough = bool(total[-1] >= top_p * mass)
            kept = min(kept, int(np.searchsorted(total, top_p * mass)) + 1)
        if min_p > 0:  # those that are not ranked are less likely than those that are
            above = int(np.count_nonzero(p >= min_p))
            enough = above < ranked.size or (enough and top_p < 1)
            kept = min(kept, above)
        if top_p < 1 or min_p > 0:
            total = total[:kept]
            mass = float(total[-1])
        if enough or whole is None or ranked.size == scores.size:
            break
        ranked = _ranked(scores, np.arange(scores.size))
    at = int(np.searchsorted(total, u * mass, side="right"))
    return int(ranked[min(at, total.size - 1)])


def penalized(logits: np.ndarray, seen: Collection[int], penalty: float) -> np.ndarray:
    """A copy of logits [vocab] in which the tokens `seen` are made less likely, each once."""
    out = np.array(logits)
    some = np.fromiter(set(seen), np.int64)
    out[some] = np.where(out[some] > 0, out[some] / penalty, out[some] * penalty)
    return out


def greedy(scores: Any) -> list[int]:
    """The likeliest token of each row [n, vocab]; on a GPU, where they are."""
    if isinstance(scores, np.ndarray):
        check_finite(scores)
    elif not math.isfinite(float(abs(scores).max())):  # the maximum of a NaN is NaN
        raise PyloraError(_NOT_FINITE)
    tokens: list[int] = scores.argmax(axis=1).tolist()
    return tokens


def check_finite(logits: np.ndarray) -> None:
    """Raises PyloraError unless all logits are finite numbers."""
    # A sum is finite unless a term is not, or the terms are so large that it overflows: one pass,
    # and nothing the size of the logits is written.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(logits.sum()) or np.isfinite(logits).all():
            return
    raise PyloraError(_NOT_FINITE)


def _ranked(scores: np.ndarray, some: np.ndarray) -> np.ndarray:
    """The tokens `some`, ascending, in the order of their scores; equals by the lower id."""
    ranked: np.ndarray = some[np.argsort(-scores[some], kind="stable")]
    return ranked
