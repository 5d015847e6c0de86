"""The jobs of llama.cpp and of a fork of it, over sessions that their engines open.

A session has `vocab`, feed(tokens) -> the likeliest next one, forget(), load(adapter), use(adapter
or None) and system().
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


class Job:
    """A callable with facts about itself."""

    def __init__(self, run: Callable[[], Any], **info: Any) -> None:
        self.run, self.info = run, info

    def __call__(self) -> Any:
        return self.run()


def decode(session: Any, ids: list[int], new: int) -> dict[str, float]:
    session.forget()
    began = time.perf_counter()
    token = session.feed(ids)
    middle = time.perf_counter()
    for _ in range(new):
        token = session.feed([token])
    return {"prefill": middle - began, "decode": time.perf_counter() - middle}


def jobs(make: Callable[..., Any]) -> dict[str, Callable[..., Job]]:
    """The jobs of llama.cpp, or of a fork of it, whose sessions `make` opens."""

    def opened(path: str, prompt: int, new: int, settings: dict[str, Any]) -> Any:
        session = make(path, prompt + new + 8, prompt, **settings)
        return session, np.random.default_rng(0).integers(0, session.vocab, prompt).tolist()

    def gguf(
        precision: str, path: str, prompt: int, new: int, model: str = "", **settings: Any
    ) -> Job:
        """The file as it is, no adapter."""
        session, ids = opened(path, prompt, new, settings)
        return Job(lambda: decode(session, ids, new), built_for=session.system())

    def adapter_cost(
        precision: str,
        ranks: list[int],
        prompt: int,
        new: int,
        path: str,
        adapters: dict[str, str],
        model: str = "",
        **settings: Any,
    ) -> Job:
        """Without an adapter (rank 0) and with one of each rank, in turn."""
        session, ids = opened(path, prompt, new, settings)
        loaded = {rank: session.load(adapters[str(rank)]) for rank in ranks}

        def run() -> dict[str, float]:
            parts = {}
            for rank in (0, *ranks):
                session.use(loaded.get(rank))
                for part, seconds in decode(session, ids, new).items():
                    parts[f"{rank} {part}"] = seconds
            return parts

        return Job(run, built_for=session.system())

    return {"gguf": gguf, "adapter_cost": adapter_cost}
