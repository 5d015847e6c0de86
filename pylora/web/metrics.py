"""What /metrics shows, in Prometheus's form: requests, tokens and times, and how the engine stands.

Counters and histograms are filled as answers end; gauges are asked of the engine when somebody
looks. A mixture of adapters is called "(mix)", the base "(base)".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from pylora.extras import need
from pylora.serving.engine import Engine
from pylora.serving.request import Usage
from pylora.serving.stats import Stats, StepReport

BASE, MIX = "(base)", "(mix)"
_TIMES = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300)  # fmt: skip

_STEPS = 64  # steps that are counted together


def label(mix: Sequence[tuple[str, float]]) -> str:
    """How the adapters of a request are called."""
    if not mix:
        return BASE
    return mix[0][0] if len(mix) == 1 else MIX


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        library = need("prometheus_client")
        self._library = library
        self.registry = library.CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Any:
            return library.Counter(f"pylora_{name}", what, labels, registry=self.registry)

        def times(name: str, what: str, *labels: str) -> Any:
            return library.Histogram(
                f"pylora_{name}_seconds", what, labels, buckets=_TIMES, registry=self.registry
            )

        self._requests = counter(
            "requests", "HTTP requests that were answered", "endpoint", "status"
        )
        self._answers = counter("answers", "answers by adapter and reason", "adapter", "reason")
        self._prompt = counter("prompt_tokens", "tokens of prompts", "adapter")
        self._cached = counter("cached_prompt_tokens", "of those, known already", "adapter")
        self._new = counter("completion_tokens", "tokens of answers", "adapter")
        self._preempted = counter("preemptions", "how often an answer gave its memory up")
        self._request = times("request", "from a request to the end of its answer", "endpoint")
        self._queued = times("queue", "in the queue")
        self._first = times("first_token", "from a request to its first token", "adapter")
        self._between = times("between_tokens", "between two tokens, on average over an answer")
        self._batch = library.Histogram(
            "pylora_batch_size", "answers that a step of the model went on with",
            buckets=(0, 1, 2, 4, 8, 16, 32, 64, 128, 256), registry=self.registry,
        )  # fmt: skip
        self._step = times("step", "one step of the model")
        self._steps: deque[StepReport] = deque()  # that are not counted yet

    def watch(self, engine: Engine) -> None:
        """Shows how this engine stands, too."""
        self.registry.register(_Gauges(need("prometheus_client.core"), engine))

    def step(self, report: StepReport) -> None:
        """A step of the engine, on its thread."""
        self._steps.append(report)
        if len(self._steps) >= _STEPS:  # many at once cost each of them less
            self._count_steps()

    def _count_steps(self) -> None:
        while self._steps:
            with suppress(IndexError):  # another thread has just taken the last
                report = self._steps.popleft()
                self._batch.observe(report.decoding)
                self._step.observe(report.seconds)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._request.labels(endpoint).observe(seconds)

    def answer(self, adapter: str, reason: str, usage: Usage) -> None:
        """An answer of the engine has ended."""
        self._answers.labels(adapter, reason).inc()
        self._prompt.labels(adapter).inc(usage.prompt_tokens)
        self._cached.labels(adapter).inc(usage.cached_tokens)
        self._new.labels(adapter).inc(usage.completion_tokens)
        self._preempted.inc(usage.preempted)
        self._queued.observe(usage.queued_s)
        if usage.completion_tokens:
            self._first.labels(adapter).observe(usage.first_s)
        if usage.completion_tokens > 1:
            rest = usage.total_s - usage.first_s
            self._between.observe(rest / (usage.completion_tokens - 1))

    def text(self) -> tuple[bytes, str]:
        """(what Prometheus reads, its content type)."""
        self._count_steps()
        return self._library.generate_latest(self.registry), self._library.CONTENT_TYPE_LATEST


# name -> (what it is, its value). What ends in _total only grows.
_GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "queued": ("requests that wait", lambda s: s.queued),
    "running": ("requests in work", lambda s: s.running),
    "refused_total": ("requests that found the queue full", lambda s: s.refused),
    "failed_total": ("answers that ended by an error", lambda s: s.ended.get("failed", 0)),
    "tokens_total": ("tokens of answers, as they come", lambda s: s.tokens),
    "steps_total": ("steps of the model", lambda s: s.steps),
    "computed_prompt_tokens_total": ("tokens of prompts computed", lambda s: s.computed_tokens),
    "kv_tokens": ("tokens that there is memory for", lambda s: s.kv_rows),
    "kv_used_tokens": ("of those, of answers in work", lambda s: s.kv_used),
    "kv_kept_tokens": ("of those, kept for prompts that begin alike", lambda s: s.kv_kept),
    "prefixes": ("prompts' beginnings that are kept", lambda s: s.prefixes),
    "prefix_hit_ratio": (
        "share of prompts' tokens that were known already",
        lambda s: s.cached_tokens / max(1, s.prompt_tokens),
    ),
}


class _Gauges:
    """Asked when somebody looks."""

    def __init__(self, core: Any, engine: Engine) -> None:
        self._core, self._engine = core, engine

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks for it."""
        stats = self._engine.stats()
        for name, (what, value) in _GAUGES.items():
            made = (
                self._core.CounterMetricFamily(f"pylora_{name.removesuffix('_total')}", what)
                if name.endswith("_total")
                else self._core.GaugeMetricFamily(f"pylora_{name}", what)
            )
            made.add_metric([], value(stats))
            yield made
        adapters = self._engine.adapters
        for name, what, now in (
            ("adapters", "adapters that have a name", len(adapters.list())),
            ("adapter_bytes", "memory of those that are packed", adapters.nbytes),
        ):
            made = self._core.GaugeMetricFamily(f"pylora_{name}", what)
            made.add_metric([], now)
            yield made
