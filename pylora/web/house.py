"""What a server has while it runs: the model's words, the engine, adapters, keys, limits, numbers.

Everything that handles a request is given this. Tokenizing, templates and grammars run in threads
of its own: `aside` takes work there.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pylora.serving.engine import Engine
from pylora.web.bell import Bell
from pylora.web.grammars import Grammars
from pylora.web.keys import Keys
from pylora.web.limits import Limits
from pylora.web.metrics import Metrics
from pylora.web.problem import closing
from pylora.web.shelf import Mix, Shelf

if TYPE_CHECKING:
    from pylora.text.tokenizer import Tokenizer

T = TypeVar("T")
_ASIDE = 4  # threads for tokenizing
_STUCK = 120.0  # seconds without a step
_OWN = 16  # grammars of adapters' own tokenizers that are kept


class House:
    """The state of one server."""

    def __init__(
        self,
        engine: Engine,
        shelf: Shelf,
        tokenizer: Tokenizer,
        vocabulary: int,
        limits: Limits,
        keys: Keys,
        metrics: Metrics,
        *,
        precision: str = "",
        fingerprint: str = "",
        pooling: str | None = None,
    ) -> None:
        """`vocabulary`: how many logits the model has; `fingerprint`: what an answer's bits depend
        on besides the request; `pooling`: how a text's rows become an embedding, None: not."""
        self.engine, self.shelf, self.tokenizer = engine, shelf, tokenizer
        self.vocabulary, self.limits, self.keys = vocabulary, limits, keys
        self.precision, self.fingerprint, self.pooling = precision, fingerprint, pooling
        self.grammars = Grammars(tokenizer, vocabulary)
        self.metrics = metrics
        self.created = int(time.time())
        self._steps = (0, time.monotonic())
        self.ending = False  # set when no new requests are taken
        self._own: dict[int, tuple[Tokenizer, Grammars]] = {}
        self._bell: Bell | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_ASIDE, "pylora-aside")

    def words(self, mix: Mix) -> tuple[Tokenizer, Grammars]:
        """The tokenizer that these adapters are used with, and its grammars."""
        own = self.shelf.tokenizer(mix)
        if own is None:
            return self.tokenizer, self.grammars
        with self._lock:
            found = self._own.get(id(own))
            if found is None:
                while len(self._own) >= _OWN:
                    del self._own[next(iter(self._own))]
                found = self._own[id(own)] = (own, Grammars(own, self.vocabulary))
        return found

    async def aside(self, work: Callable[[], T]) -> T:
        """`work()` in a thread. Problem (503) once the server is ending."""
        if self.ending:
            raise closing()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def bell(self) -> Bell:
        """Of the event loop that this is called on."""
        loop = asyncio.get_running_loop()
        if self._bell is None or self._bell.loop is not loop:
            self._bell = Bell(loop)
        return self._bell

    def stuck(self) -> bool:
        """Whether there is work, and the engine has made no step for long."""
        stats, now = self.engine.stats(), time.monotonic()
        if stats.steps != self._steps[0] or not stats.running + stats.queued:
            self._steps = (stats.steps, now)
        return now - self._steps[1] > _STUCK

    def close(self) -> None:
        """Ends the threads."""
        self.ending = True
        self._threads.shutdown(wait=False, cancel_futures=True)
