"""The engine: requests in from any thread, their tokens out as events, one thread in between.

    registry = Registry(model)
    registry.load("legal", "adapters/legal")
    with Engine(model, registry) as engine:
        engine.submit(Request(ids, 64, adapters=(("legal", 0.7),)), print)

A request's tokens and logprobs have the bits of `generate` for it alone, whoever else is served, in
every precision, wherever the backend keeps rows apart (`ops.bitwise`). Here is who comes and goes;
memory is in scheduler.py, a step in stepper.py.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from types import TracebackType

from pylora.errors import ConfigError, PyloraError, expect
from pylora.generation.sampling import whole_number
from pylora.model.inputs import token_ids
from pylora.model.llama import Llama
from pylora.serving.adapters import Registry
from pylora.serving.arena import BLOCK, Arena, rounded, row_bytes
from pylora.serving.pace import Pace
from pylora.serving.request import Began, Closed, OnEvent, QueueFull, Request
from pylora.serving.run import Run
from pylora.serving.scheduler import Scheduler
from pylora.serving.stats import AdapterStats, Stats, StepReport
from pylora.serving.stepper import Outcome, Stepper
from pylora.serving.waiting import Waiting

_log = logging.getLogger(__name__)
OnStep = Callable[[StepReport], None]
DEFAULT_KV_BYTES = 1 << 30
_NAMES = 4096  # adapters of which numbers are kept
_PUBLISH = 0.1  # seconds between two looks at the memory's numbers
_FAILED, _CLOSED = "failed", "closed"  # ends that are an error


class Ticket:
    """A request that was taken in."""

    def __init__(self, engine: Engine, run: Run) -> None:
        self._engine, self._run = engine, run

    @property
    def id(self) -> int:
        """Its number: requests are counted from 1."""
        return self._run.number

    @property
    def done(self) -> bool:
        """Whether its last event has been said."""
        return self._run.done

    def cancel(self) -> None:
        """Asks it to end, from any thread; the end comes as an event, `Done("cancelled")`."""
        self._run.cancelled = True
        self._engine._wake()


class Engine:
    """One model and the requests on it. Its methods may be called by any thread."""

    def __init__(
        self,
        model: Llama,
        adapters: Registry | None = None,
        *,
        kv_bytes: int | None = None,
        max_batch: int = 32,
        prefill_chunk: int = 512,
        queue_limit: int = 256,
        prefix_cache: bool = True,
        on_step: OnStep | None = None,
        start: bool = True,
    ) -> None:
        """`kv_bytes` of memory for keys and values; default: 1 GiB, or less where `max_batch`
        requests of the model's full length need less. `max_batch` requests are in work at a time,
        `queue_limit` more may wait. `prefill_chunk`: tokens of prompts that a step takes in at
        most. `on_step` hears of each step, on the engine's thread. `start`: False leaves what is
        submitted in the queue until `start` is called.

        Raises ConfigError for settings out of range, a registry of another model, a model with an
        adapter attached, and for memory that holds no request.
        """
        expect("model", model, "Engine(model)")
        whole_number("max_batch", max_batch, 1)
        whole_number("prefill_chunk", prefill_chunk, 1)
        whole_number("queue_limit", queue_limit, 0)
        self.model = model
        self.adapters = Registry(model) if adapters is None else adapters
        if self.adapters.model is not model:
            raise ConfigError("this registry of adapters was made for another model")
        if any(module.lora is not None for module in model.modules.values()):
            raise ConfigError(
                "the model has an adapter attached; call model.detach(), and load the adapter into "
                "the registry if it is meant"
            )
        self.queue_limit, self._on_step = queue_limit, on_step
        self._arena = Arena(model, _rows(model, kv_bytes, max_batch), max_batch)
        self._scheduler = Scheduler(model, self._arena, max_batch, prefix_cache)
        self._stepper = Stepper(model, self._scheduler, Pace(prefill_chunk))
        self._waiting = Waiting()
        self._stats = Stats(kv_rows=self._arena.rows)
        self._max_batch = max_batch
        self._numbers = 0
        self._ends: deque[float] = deque(maxlen=64)  # when requests ended, lately
        self._look = False  # somebody wants to be gone
        self._earliest = math.inf  # deadline of those that are there
        self._published = 0.0
        self._closing = False  # nothing more is taken in
        self._stopped = False  # and what is there is handed back
        self._change = threading.Condition()  # guards the queue, the numbers and these flags
        self._thread = threading.Thread(target=self._loop, name="pylora-engine", daemon=True)
        if start:
            self.start()

    def __repr__(self) -> str:
        return (
            f"Engine({len(self._scheduler.running)} running, {len(self._waiting)} waiting, "
            f"memory for {self._arena.rows} tokens)"
        )

    @property
    def most_tokens(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.config.max_position_embeddings, self._arena.rows)

    # ---- for any thread -----------------------------------------------------------------------

    def start(self) -> None:
        """Begins to work; a second time does nothing."""
        with self._change:
            if self._thread.ident is None:
                self._thread.start()

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Takes a request in. `on_event` hears what comes of it, on the engine's thread; the last
        event is `Done` or `Failed`.

        Reads an adapter from the disk where it is not resident, so that it may take a moment.
        Raises DataError for a token outside the vocabulary, ConfigError for a request that is too
        long or that names what is not there (UnknownAdapter), QueueFull where too many wait,
        Closed; and what reading an adapter raises.
        """
        if not isinstance(request, Request):
            raise ConfigError(f"submit takes a Request(...), got {request!r:.100}")
        self._check(request)
        with self._change:
            self._room()
        lease = self.adapters.resolve(request.adapters)
        ends = request.stop_ids
        if ends is None:
            ends = self.model.config.eos_token_ids
        try:
            with self._change:
                self._room()
                self._numbers += 1
                run = Run(
                    self._numbers, request, on_event, lease,
                    frozenset() if request.ignore_eos else frozenset(map(int, ends)),
                )  # fmt: skip
                self._waiting.add(run)
                if request.deadline is not None:
                    self._earliest = min(self._earliest, request.deadline)
                self._stats.requests += 1
                for name in lease.names or ("",):
                    self._of(name).requests += 1
                self._change.notify_all()
        except BaseException:
            lease.release()
            raise
        return Ticket(self, run)

    def stats(self) -> Stats:
        """The numbers, as they are now."""
        with self._change:
            stats = self._stats
            stats.queued, stats.running = len(self._waiting), len(self._scheduler.running)
            return deepcopy(stats)

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests. `finish`: those that are there end first, for at most `timeout`
        seconds; what is left then, or with finish=False everything, is handed back: it ends by
        `Failed(Closed)`, to be asked elsewhere. Closing twice is fine."""
        with self._change:
            self._closing = True
            self._stopped = self._stopped or not finish
            self._change.notify_all()
        self.start()  # also to hand back what was never begun
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout if finish else None)
        if self._thread.is_alive():
            with self._change:
                self._stopped = True
                self._change.notify_all()
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(finish=kind is None)

    def _check(self, request: Request) -> None:
        config = self.model.config
        token_ids(request.ids, config.vocab_size)
        request.sampling.check_vocabulary(config.vocab_size)
        size = len(request.ids) + request.max_new_tokens
        if size > config.max_position_embeddings:
            raise ConfigError(
                f"the prompt has {len(request.ids)} tokens; with {request.max_new_tokens} new ones "
                f"it exceeds the model's max_position_embeddings ({config.max_position_embeddings})"
            )
        if size > self._arena.rows:
            raise ConfigError(
                f"the prompt has {len(request.ids)} tokens; with {request.max_new_tokens} new ones "
                f"it exceeds the {self._arena.rows} that there is memory for (kv_bytes)"
            )

    def _room(self) -> None:
        """Raises Closed or QueueFull where no request is taken in. Holds the lock."""
        if self._closing:
            raise Closed("the engine is closing and takes no more requests")
        there = len(self._waiting) + len(self._scheduler.running)
        if there >= self._max_batch + self.queue_limit:
            self._stats.refused += 1
            raise QueueFull(
                f"{there} requests are there already, and no more may wait; try again later",
                self._patience(),
            )

    def _patience(self) -> float:
        """Seconds after which the queue will have moved on, as an estimate: 1 to 60."""
        if len(self._ends) < 2:
            return 1.0
        each = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(max(each * len(self._waiting), 1.0), 60.0)

    def _of(self, name: str) -> AdapterStats:
        """The numbers of an adapter. Holds the lock."""
        found = self._stats.adapters.get(name)
        if found is None:
            if len(self._stats.adapters) >= _NAMES:
                self._stats.adapters.pop(next(iter(self._stats.adapters)))
            found = self._stats.adapters[name] = AdapterStats()
        return found

    def _wake(self) -> None:
        with self._change:
            self._look = True
            self._change.notify_all()

    # ---- the engine's thread ------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            self._turn()
            with self._change:
                if self._scheduler.running or len(self._waiting):
                    continue
                self._publish()
                if self._closing:
                    break
                if not self._look:
                    self._change.wait()
        self._scheduler.forget()
        self._stepper.forget()

    def _turn(self) -> None:
        """Lets requests go and come, and makes one step."""
        with self._change:
            leaving = self._leaving()
        for run, reason in leaving:
            self._end(run, reason)
        with self._change:
            joined = self._scheduler.admit(self._waiting)
            for run in joined:
                self._count(run)
            if time.monotonic() - self._published > _PUBLISH:
                self._publish()
        for run in joined:
            run.say(Began(run.cached))
        try:
            outcome = self._step()
        except Exception as error:
            self._broken(error)
        else:
            self._account(outcome)

    def _leaving(self) -> list[tuple[Run, str]]:
        """Who has to go, and why. Holds the lock."""
        now = time.monotonic()
        look = self._look or self._stopped or now >= self._earliest
        if not look and not any(run.cancelled for run in self._scheduler.running):
            return []
        self._look, self._earliest, leaving = False, math.inf, []
        for run in [*self._waiting, *self._scheduler.running]:
            end = math.inf if run.request.deadline is None else run.request.deadline
            if run.cancelled or self._stopped:
                leaving.append((run, "cancelled" if run.cancelled else _CLOSED))
            elif end <= now:
                leaving.append((run, "deadline"))
            else:
                self._earliest = min(self._earliest, end)
        return leaving

    def _step(self) -> Outcome | None:
        scheduler = self._scheduler
        for run in list(scheduler.running):
            assert run.extent is not None or run.slot < 0
            if run.extent is not None and run.length + 1 > run.extent.size:
                with self._change:  # somebody may have to go back into the queue
                    scheduler.grow(run, run.length + 1, self._waiting)
        return self._stepper.step() if scheduler.running else None

    def _account(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        for run, reason in outcome.ended:
            self._end(run, reason)
        for run, error in outcome.failed:
            self._end(run, _FAILED, error)
        with self._change:
            stats = self._stats
            stats.steps += 1
            stats.step_seconds += outcome.seconds
            stats.computed_tokens += outcome.prompt_tokens
            for run in outcome.said:
                self._count_new(run)
            queued = len(self._waiting)
        if self._on_step is not None:
            report = StepReport(outcome.decoding, outcome.prompt_tokens, outcome.seconds, queued)
            try:
                self._on_step(report)
            except Exception:
                _log.exception("on_step failed; it is not called again")
                self._on_step = None

    def _count(self, run: Run) -> None:
        """A request has joined for the first time. Holds the lock."""
        stats, size = self._stats, int(run.prompt.size)
        stats.prompt_tokens += size
        stats.cached_tokens += run.cached
        for name in run.lease.names or ("",):
            of = self._of(name)
            of.prompt_tokens += size
            of.cached_tokens += run.cached

    def _count_new(self, run: Run) -> None:
        """Tokens of an answer that have come since this was last called. Holds the lock."""
        n = len(run.answer) - run.counted
        if n:
            run.counted += n
            self._stats.tokens += n
            for name in run.lease.names or ("",):
                self._of(name).tokens += n

    def _end(self, run: Run, reason: str, error: PyloraError | None = None) -> None:
        """A request's end, by a reason of `Done` or by an error."""
        with self._change:
            if run.slot >= 0:
                self._scheduler.end(run)
            else:
                self._waiting.remove(run)
            self._count_new(run)
            ended = self._stats.ended
            ended[reason] = ended.get(reason, 0) + 1
            self._ends.append(time.monotonic())
        if reason == _CLOSED:
            error = Closed("the engine was closed before the answer was whole; ask again elsewhere")
        if error is None:
            run.end(reason)
        else:
            run.fail(error)

    def _broken(self, error: Exception) -> None:
        """A step has failed as a whole: those in it end by the error, the others go on."""
        _log.error("a step failed", exc_info=error)
        said = error
        if not isinstance(said, PyloraError):
            said = PyloraError(f"the model failed at a step: {type(error).__name__}: {error}")
            said.__cause__ = error
        self._stepper.forget()
        running = list(self._scheduler.running)
        self._scheduler.forget()
        for run in running:
            with self._change:
                self._waiting.put_back(run)  # it has no memory any more, like one that waits
            self._end(run, _FAILED, said)

    def _publish(self) -> None:
        """What `stats` says about memory. Holds the lock."""
        stats, scheduler, now = self._stats, self._scheduler, time.monotonic()
        self._published = now
        stats.preemptions = scheduler.preemptions
        stats.prefixes, stats.kv_kept = len(scheduler.prefixes), scheduler.prefixes.rows
        stats.kv_used = self._arena.used - stats.kv_kept


def _rows(model: Llama, kv_bytes: int | None, max_batch: int) -> int:
    """Rows of keys and values that the memory has room for."""
    each, longest = row_bytes(model), model.config.max_position_embeddings
    if kv_bytes is None:
        return min(max_batch * rounded(longest), max(DEFAULT_KV_BYTES // each, BLOCK))
    whole_number("kv_bytes", kv_bytes, 1)
    if kv_bytes < BLOCK * each:
        raise ConfigError(
            f"kv_bytes = {kv_bytes:,} holds no request: {BLOCK} tokens of this model take "
            f"{BLOCK * each:,} bytes"
        )
    return kv_bytes // each
