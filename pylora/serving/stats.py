"""What an engine has done and is doing, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AdapterStats:
    """Of the requests that named an adapter; of a sum each of its adapters counts."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


@dataclass
class Stats:
    """Counters since the engine began, and how it is now."""

    queued: int = 0  # requests that wait
    running: int = 0  # requests in work
    requests: int = 0  # that have come
    ended: dict[str, int] = field(default_factory=dict)  # by the reason of `Done`, and "failed"
    refused: int = 0  # because the queue was full
    prompt_tokens: int = 0  # of requests that have begun
    cached_tokens: int = 0  # of those, known from earlier ones
    computed_tokens: int = 0  # of prompts, again after a preemption too
    tokens: int = 0  # of answers, as they come
    steps: int = 0
    step_seconds: float = 0.0  # in the model
    preemptions: int = 0
    kv_rows: int = 0  # tokens that there is memory for
    kv_used: int = 0  # of those, of requests in work
    kv_kept: int = 0  # of those, of prefixes
    prefixes: int = 0
    adapters: dict[str, AdapterStats] = field(default_factory=dict)  # "": the base model


@dataclass(frozen=True)
class StepReport:
    """One step of the model."""

    decoding: int  # requests that got their next token
    prompt_tokens: int  # of prompts that were taken in
    seconds: float
    queued: int
