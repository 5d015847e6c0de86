"""Choosing one token from logits: greedy, or drawn by a number between 0 and 1.

Each setting has the name, the meaning and the order that transformers gives it: repetition
penalty, then temperature, top_k, top_p, min_p. What OpenAI's interface adds stands where vLLM and
llama.cpp have it: the bias before the penalties, presence and frequency behind the repetition.
Random numbers are drawn elsewhere (pylora/numbers/random.py), so a choice is a function of its
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import ConfigError, PyloraError
from pylora.generation.logprobs import largest

_NOT_FINITE = (
    "the model's logits are not finite, so no token can be chosen; check the weights and the "
    "adapter for NaN or infinite values"
)
_MOST = 1000.0  # of a bias or a penalty: more than any logit, and no sum overflows
_UNLIKELY = 1e-5  # a token of a lower probability is ranked only where the others do not decide


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Raises ConfigError, naming the setting, for a value out of range.

    temperature 0 takes the likeliest token (the lowest id of equals) and then top_k, top_p and
    min_p change nothing. repetition_penalty > 1 makes tokens of the prompt and the answer so far
    less likely: their logits are divided by it where positive, multiplied by it where negative.
    From the logit of a token that the answer (not the prompt) has c > 0 times, presence_penalty +
    c frequency_penalty is taken. logit_bias, {token: number} or pairs, is added to logits first.
    """

    temperature: float = 0.0
    top_k: int = 0  # keep this many of the likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that have this share together
    min_p: float = 0.0  # keep those at least this share as likely as the likeliest
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Any = ()  # kept as pairs (token, number), in the order of the tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for name, low, high, text in (
            ("temperature", 0, math.inf, "0 (greedy) or positive"),
            ("top_p", 0, 1, "above 0 and at most 1"),
            ("min_p", 0, 1, "from 0 to 1"),
            ("repetition_penalty", 0, math.inf, "positive; 1 changes nothing"),
            ("presence_penalty", -_MOST, _MOST, "from -1000 to 1000; 0 changes nothing"),
            ("frequency_penalty", -_MOST, _MOST, "from -1000 to 1000; 0 changes nothing"),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.integer, np.floating))
            closed = name not in ("top_p", "repetition_penalty")  # their lower end is allowed
            if not number or isinstance(value, bool) or not math.isfinite(value):
                raise ConfigError(f"{name} must be {text}, got {value!r:.100}")
            if not low <= value <= high or (value == low and not closed):
                raise ConfigError(f"{name} must be {text}, got {value}")
        whole_number("top_k", self.top_k, 0)

    @property
    def penalizes(self) -> bool:
        """Whether what was said before changes the choice."""
        return self.repetition_penalty != 1 or self.counts

    @property
    def counts(self) -> bool:
        """Whether it matters how often the answer has a token."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Whether this is the likeliest token, by the logits as they are."""
        return self.temperature == 0 and not self.changes

    @property
    def changes(self) -> bool:
        """Whether logits are changed before one is chosen."""
        return self.penalizes or bool(self.logit_bias)

    def check_vocabulary(self, size: int) -> None:
        """ConfigError for a bias of a token that a vocabulary of this size does not have."""
        for token, _ in self.logit_bias:
            if token >= size:
                raise ConfigError(
                    f"logit_bias names the token {token}; the vocabulary has 0 to {size - 1}"
                )

    def choose(
        self,
        logits: np.ndarray,
        u: float,
        seen: Collection[int] = (),
        counts: Mapping[int, int] | None = None,
        allowed: np.ndarray | None = None,
    ) -> int:
        """One token from logits [vocab] and a number 0 < u < 1.

        `seen`: the tokens before it; `counts`: how often the answer has each of its own; `allowed`:
        int64, ascending, at least one: the tokens that may come, all others being left out.
        """
        check_finite(logits)
        if self.changes:
            logits = self._changed(logits, seen, counts or {})
        if allowed is not None:
            logits = logits[allowed]
        if self.temperature == 0:
            at = int(logits.argmax())
        else:
            at = sample(logits, u, self.temperature, self.top_k, self.top_p, self.min_p)
        return at if allowed is None else int(allowed[at])

    def _changed(
        self, logits: np.ndarray, seen: Collection[int], counts: Mapping[int, int]
    ) -> np.ndarray:
        """The logits with bias and penalties, a copy."""
        out = np.array(logits)
        for token, bias in self.logit_bias:
            out[token] += bias
        if self.repetition_penalty != 1:
            out = penalized(out, seen, self.repetition_penalty)
        if self.counts and counts:
            tokens = np.fromiter(counts, np.int64, len(counts))
            often = np.fromiter(counts.values(), out.dtype, len(counts))
            out[tokens] -= self.presence_penalty + often * self.frequency_penalty
        return out


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """A logit_bias as pairs in the order of the tokens. ConfigError for what is none."""
    try:
        given = list(bias.items() if isinstance(bias, Mapping) else bias)
        pairs = [(token, value) for token, value in given]
    except (TypeError, ValueError):
        raise ConfigError(f"logit_bias must be {{token: number}}, got {bias!r:.100}") from None
    for token, value in pairs:
        whole_number("a token of logit_bias", token, 0)
        number = isinstance(value, (int, float, np.integer, np.floating))
        if not number or isinstance(value, bool) or not abs(value) <= _MOST:
            raise ConfigError(
                f"logit_bias of token {token} must be from -1000 to 1000, got {value!r:.100}"
            )
    found = {int(token): float(value) for token, value in pairs}
    if len(found) < len(pairs):
        raise ConfigError("logit_bias names a token twice; give it one number")
    return tuple(sorted(found.items()))


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
    exceeds u times the sum of all that stayed. (Tokens that cannot decide, each less likely than
    one in 100,000, are summed as the logits are stored, in float32 on the usual backends.)
    """
    check_finite(logits)
    scores = logits
    if 0 < top_k < scores.size:
        ranked = largest(scores, top_k)
        whole = None
    else:  # the likely ones alone are ranked first: they nearly always decide
        p = _shares(scores, temperature)
        whole = float(p.sum(dtype=np.float64))
        ranked = _ranked(scores, np.flatnonzero(p > whole * _UNLIKELY))
    while True:
        some = scores[ranked].astype(np.float64)
        p = np.exp((some - some[0]) / temperature)  # of the first: 1
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
        raise not_finite()
    tokens: list[int] = scores.argmax(axis=1).tolist()
    return tokens


def check_finite(logits: np.ndarray) -> None:
    """Raises PyloraError unless all logits are finite numbers."""
    # A sum is finite unless a term is not, or the terms are so large that it overflows: one pass,
    # and nothing the size of the logits is written.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(logits.sum()) or np.isfinite(logits).all():
            return
    raise not_finite()


def not_finite() -> PyloraError:
    """The error of logits with a NaN or an infinite number."""
    return PyloraError(_NOT_FINITE)


def _shares(scores: np.ndarray, temperature: float) -> np.ndarray:
    """exp((score - the highest) / temperature) of each, as the scores are stored."""
    if scores.dtype.type(temperature) == 0:
        scores = scores.astype(np.float64)
    with np.errstate(over="ignore"):  # a difference that is too large: no share at all
        p: np.ndarray = scores - scores.max()
        p /= temperature
    np.exp(p, out=p)
    return p


def _ranked(scores: np.ndarray, some: np.ndarray) -> np.ndarray:
    """The tokens `some`, ascending, in the order of their scores; equals by the lower id."""
    ranked: np.ndarray = some[np.argsort(-scores[some], kind="stable")]
    return ranked
