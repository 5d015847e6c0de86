"""Ranks that are threads of one process, so that what several processes do needs no MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from pylora.training.ranks import added


class Threads:
    """Ranks that are threads of this process, and add as one process would."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.table = rank, size, barrier, table

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(20)
        out = list(self.table)
        self.barrier.wait(20)
        return out

    def first(self, work: Callable[[], Any]) -> Any:
        return self.gather(work() if self.rank == 0 else None)[0]

    def copy(self, arrays: Iterable[np.ndarray]) -> None:
        mine = list(arrays)
        for own, theirs in zip(mine, self.gather(mine)[0], strict=True):
            own[...] = theirs

    def sums(self, mine: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        assert counts[self.rank] == len(mine)
        return added([v for one in self.gather(list(mine)) for v in one])


def together(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What `work(ranks)` gives on each of `size` ranks; the first error is raised."""
    barrier, table = threading.Barrier(size), [None] * size
    out: list[Any] = [None] * size

    def one(rank: int) -> None:
        try:
            out[rank] = work(Threads(rank, size, barrier, table))
        except Exception as error:
            out[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got in out:
        if isinstance(got, Exception) and not isinstance(got, threading.BrokenBarrierError):
            raise got
    return out
