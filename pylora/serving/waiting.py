"""Who is next: the requests that wait, fair between those who ask.

A request that had to give its memory up goes first. Then come the keys (`Request.key`) in turn: of
those that wait the one with the fewest requests in work, of equals the one that has waited longest
for its turn; of one key the oldest request. So whoever asks a thousand times at once delays
himself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator

from pylora.serving.run import Run


class Waiting:
    """The queue. One thread at a time: the engine holds its lock."""

    def __init__(self) -> None:
        self._again: deque[Run] = deque()  # the oldest request first
        self._of: dict[str, deque[Run]] = {}
        self._turn: dict[str, int] = {}  # when a key had its last turn
        self._turns = 0

    def __len__(self) -> int:
        return len(self._again) + sum(map(len, self._of.values()))

    def __iter__(self) -> Iterator[Run]:
        yield from self._again
        for runs in self._of.values():
            yield from runs

    def add(self, run: Run) -> None:
        """To the end of its key's line."""
        self._of.setdefault(run.request.key, deque()).append(run)

    def put_back(self, run: Run) -> None:
        """To the front: it was in work already."""
        at = sum(other.number < run.number for other in self._again)
        self._again.insert(at, run)

    def next(self, running: Iterable[Run], passed: Collection[Run] = ()) -> Run | None:
        """Whose turn it is, but for those that are passed; None where nobody else waits. It stays
        in the queue."""
        for run in self._again:
            if run not in passed:
                return run
        busy = Counter(run.request.key for run in running)
        for key in sorted(self._of, key=lambda key: (busy[key], self._turn.get(key, 0))):
            for run in self._of[key]:
                if run not in passed:
                    return run
        return None

    def remove(self, run: Run) -> None:
        """It leaves the queue, to be worked on or to end."""
        if run in self._again:
            self._again.remove(run)
            return
        key = run.request.key
        runs = self._of[key]
        self._turns += 1
        self._turn[key] = self._turns
        runs.remove(run)
        if not runs:
            del self._of[key]
            if len(self._turn) > 4096:  # keys of long ago
                self._turn = {k: self._turn[k] for k in self._of if k in self._turn}
