"""What the engine is asked and what it answers: plain data, token ids alone.

Nothing here computes. A `Request` is checked when it is made, as far as that goes without a model;
the rest (is a token in the vocabulary, is the prompt too long) is checked by `Engine.submit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pylora.errors import ConfigError, DataError, PyloraError, expect
from pylora.generation.sampling import Sampling, whole_number
from pylora.numbers import random

POOLINGS = ("last", "mean")  # how the rows of a prompt become one
MOST_LOGPROBS = 20  # the likeliest tokens that an event may list, as in OpenAI's interface


class Mask(Protocol):
    """Which tokens may come next, as a grammar or a schema says it.

    `allowed` is called on the engine's thread before each token, with the answer so far: it gives
    a bool array [vocab], or the same as bits, uint32 or int32 [(vocab + 31) // 32], bit i % 32 of
    word i // 32 being token i (llguidance's layout). Tokens behind the array's end are not allowed.
    What it raises ends this request with `Failed`, and no other. One mask serves one request.
    """

    def allowed(self, answer: Sequence[int]) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Request:
    """One answer that is wanted. ConfigError or DataError, as a sentence, for what is wrong.

    `row` tells answers to the same prompt apart (n > 1): each draws from its own random stream,
    that of `generate(..., first_row=row)`. `adapters` are (name, weight): none is the base model,
    one of weight 1 is that adapter, several are their weighted sum. `stop_ids` end the answer and
    are no part of it; None: the model's end-of-text tokens. With `ignore_eos` nothing ends it
    but its length. `logprobs` k asks for each token's logprob and the k likeliest, and
    `prompt_logprobs` for those of the prompt's tokens (an `Echo` event). `pooling`, one of
    POOLINGS, asks for the prompt's rows behind the last norm as one (a `Pooled` event), and for no
    new tokens. `deadline` is an instant of `time.monotonic()`. `key` names whose request it is: the
    engine is fair between keys.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    row: int = 0
    stop_ids: Collection[int] | None = None
    ignore_eos: bool = False
    adapters: tuple[tuple[str, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    pooling: str | None = None
    mask: Mask | None = None
    deadline: float | None = None
    key: str = ""

    def __post_init__(self) -> None:
        expect("ids", self.ids, "Request(ids, max_new_tokens)")
        if not hasattr(self.ids, "__len__") or len(self.ids) == 0:
            raise DataError("the prompt is empty; give at least one token, such as the BOS token")
        whole_number("max_new_tokens", self.max_new_tokens, 0)
        whole_number("row", self.row, 0)
        random.check_seed(self.seed)
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"sampling must be a Sampling(...), got {self.sampling!r:.100}")
        if self.logprobs is not None:
            whole_number("logprobs", self.logprobs, 0)
            if self.logprobs > MOST_LOGPROBS:
                raise ConfigError(
                    f"logprobs lists at most {MOST_LOGPROBS} tokens, got {self.logprobs}"
                )
        if self.pooling is not None and self.pooling not in POOLINGS:
            raise ConfigError(
                f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r:.100}"
            )
        if self.pooling is not None and self.max_new_tokens:
            raise ConfigError("pooling asks for a row of the prompt: max_new_tokens must be 0")
        for pair in self.adapters:
            if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ConfigError(f"adapters must be pairs (name, weight), got {pair!r:.100}")
            name, weight = pair
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not math.isfinite(weight):
                raise ConfigError(f"the weight of adapter {name!r} is no finite number: {weight!r}")
        names = [name for name, _ in self.adapters]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"adapter {name!r} is named twice; give it one weight")


@dataclass(frozen=True)
class Usage:
    """What a request cost. `cached_tokens` of the prompt were known from earlier requests."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queued_s: float  # from submit to the first step
    first_s: float  # from submit to the first token; 0 without one
    total_s: float  # from submit to the end
    preempted: int  # how often it had to give its memory up and began again where it was


@dataclass(frozen=True)
class Began:
    """The request has left the queue; so many tokens of its prompt were known already."""

    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """A token of the answer, in order. `logprob` (natural logarithm, of the model's own
    distribution, before temperature, penalties, bias and mask) is None unless asked for; `top` are
    the likeliest (id, logprob), likeliest first, equals by the lower id."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Echo:
    """The prompt's tokens in order, once, before the first `Token`: the first has no logprob."""

    tokens: tuple[Token, ...]


@dataclass(frozen=True, eq=False)
class Pooled:
    """The rows of the prompt behind the model's last norm as one, float64 [hidden]: the last of
    them, or their mean."""

    row: np.ndarray


@dataclass(frozen=True)
class Done:
    """The end. reason: "stop" (a token of stop_ids came, it is no part of the answer), "length",
    "cancelled" or "deadline"."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The end, by an error that says what went wrong; the other requests go on."""

    error: PyloraError


Event = Began | Echo | Pooled | Token | Done | Failed
OnEvent = Callable[[Event], None]  # on the engine's thread: hand it on and return


class QueueFull(PyloraError):
    """No room for another request now. `retry_after` is an estimate, in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Closed(PyloraError):
    """The engine is closing or closed and takes no more requests."""


class UnknownAdapter(ConfigError):
    """A request names an adapter that is not there."""


class AdaptersFull(QueueFull):
    """All adapters that fit in memory are in use; one of them has to end first."""
