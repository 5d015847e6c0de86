"""A request on its way: what it has said so far, how far it is computed, where its rows are.

One thread, the engine's, changes a `Run`; others may only ask it to end (`cancelled`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pylora.errors import PyloraError
from pylora.generation.choosing import Chooser
from pylora.serving.arena import Extent
from pylora.serving.request import Done, Event, Failed, OnEvent, Request, Token, Usage

if TYPE_CHECKING:
    from pylora.serving.adapters import Lease

_log = logging.getLogger(__name__)


class Run:
    """One request, from `Engine.submit` to its end."""

    def __init__(
        self, number: int, request: Request, on_event: OnEvent, lease: Lease, ends: frozenset[int]
    ) -> None:
        """`ends`: the tokens that end the answer."""
        self.number, self.request, self.lease, self.ends = number, request, lease, ends
        self._on_event = on_event
        self.prompt = np.asarray(request.ids, np.int64)
        self.answer: list[int] = []
        self.counted = 0  # tokens of it that the engine's numbers have
        self.chooser = Chooser(self.prompt.tolist(), request.sampling, request.seed, request.row)
        # Whether the token that comes is the likeliest, with nothing else to look at or to say.
        self.plain = self.chooser.plain and request.mask is None and request.logprobs is None
        self.slot = -1
        self.extent: Extent | None = None
        self.length = 0  # tokens whose keys and values are in the extent
        self.cached = 0  # of the prompt, known when it joined
        self.echo: list[Token] | None = [] if request.prompt_logprobs else None
        self.pooled: np.ndarray | None = None  # the sum of the prompt's rows so far, float64
        self.preempted = 0
        self.submitted, self.started, self.first = time.monotonic(), 0.0, 0.0
        self.cancelled = False  # by its ticket, from any thread
        self.done = False

    # ---- how far it is ------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return self.prompt.size + len(self.answer)

    @property
    def pending(self) -> int:
        """Tokens that are still to be computed before the next one can be chosen."""
        return self.total - self.length

    @property
    def every(self) -> bool:
        """Whether something is asked of each of the prompt's tokens, so that all are computed."""
        return self.echo is not None or self.request.pooling == "mean"

    @property
    def most(self) -> int:
        """Rows that it may come to need; the answer's last token needs none."""
        return self.prompt.size + max(self.request.max_new_tokens, 1) - 1

    def ids(self, first: int, n: int) -> Sequence[int]:
        """Tokens first .. first + n - 1."""
        size = self.prompt.size
        if first >= size:
            return self.answer[first - size : first - size + n]
        some: list[int] = self.prompt[first : first + n].tolist()
        return some + self.answer[: max(0, first + n - size)]

    def first_ids(self, n: int) -> np.ndarray:
        """The first n tokens of prompt and answer, int64."""
        answer = np.asarray(self.answer[: max(0, n - self.prompt.size)], np.int64)
        return np.concatenate([self.prompt[:n], answer])

    def spans(self, first: int, n: int) -> np.ndarray:
        """With which length each of these tokens is rotated, as `generate` does it: a prompt as one
        text, an answer token by token."""
        return np.maximum(np.arange(first + 1, first + n + 1, dtype=np.int64), self.prompt.size)

    # ---- what is said about it ----------------------------------------------------------------

    def say(self, event: Event) -> None:
        """To who asked. What goes wrong there is that side's trouble: the request is given up."""
        try:
            self._on_event(event)
        except Exception:
            _log.exception(
                "the listener of request %d failed; the request is cancelled", self.number
            )
            self.cancelled = True

    def take(self, token: Token) -> None:
        """A token of the answer."""
        if not self.answer:
            self.first = time.monotonic()
        self.answer.append(token.id)
        self.chooser.take(token.id)
        self.say(token)

    def end(self, reason: str) -> None:
        """The last event, by a reason of `Done`."""
        self.done = True
        self.lease.release()
        self.say(Done(reason, self.usage()))

    def fail(self, error: PyloraError) -> None:
        """The last event, by an error."""
        self.done = True
        self.lease.release()
        self.say(Failed(error))

    def usage(self) -> Usage:
        """What it has cost until now."""
        now = time.monotonic()
        return Usage(
            int(self.prompt.size),
            len(self.answer),
            self.cached,
            (self.started or now) - self.submitted,
            self.first - self.submitted if self.first else 0.0,
            now - self.submitted,
            self.preempted,
        )
