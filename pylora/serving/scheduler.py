"""Who runs, and where: requests join when there is a slot and memory, and leave when they end.

Memory is taken as an answer grows. Where there is none, prefixes of earlier requests go first, then
what is free is slid together, and then the request that joined last gives its memory up: it waits
at the head of the queue and its tokens are computed again later, with the same bits. A request
never joins at another's cost, so the oldest always ends.
"""

from __future__ import annotations

import time

from pylora.model.llama import Llama
from pylora.serving.arena import Arena, Extent, rounded
from pylora.serving.prefixes import SHORTEST, Prefix, Prefixes, common
from pylora.serving.run import Run
from pylora.serving.waiting import Waiting

_AHEAD, _FAR = 64, 1024


class Scheduler:
    """The requests in work and their memory. The engine's thread alone uses it."""

    def __init__(self, model: Llama, arena: Arena, slots: int, keep_prefixes: bool) -> None:
        self.model, self.arena = model, arena
        self.prefixes = Prefixes(arena)
        self.running: list[Run] = []  # in the order in which they joined
        self._free = list(range(slots))[::-1]
        # Prefixes are shared where a row's bits depend on nothing but the tokens before it.
        self._keep = keep_prefixes and model.ops.bitwise
        self._by_length = model.rope.by_length
        self.preemptions = 0
        self.ahead = _AHEAD  # rows that a request has at least before it when it joins
        self.far = _FAR  # rows that it gets at once where they are free

    # ---- joining ------------------------------------------------------------------------------

    def admit(self, waiting: Waiting) -> list[Run]:
        """Lets requests join while there is room for them, in the order of `waiting`; those that
        have for the first time."""
        if not len(waiting):
            return []
        joined: list[Run] = []
        passed: set[Run] = set()  # those that wait for another's prefix
        while self._free and (run := waiting.next(self.running, passed)) is not None:
            if self._sharing(run):
                passed.add(run)
                continue
            if not self._join(run):
                break
            waiting.remove(run)
            if not run.started:
                run.started, run.cached = time.monotonic(), run.length
                joined.append(run)
        return joined

    def _shares(self, run: Run) -> bool:
        """Whether its beginning may be another's."""
        long = self._by_length and run.prompt.size > self.model.rope.unchanged
        return self._keep and not long

    def _sharing(self, run: Run) -> bool:
        """Whether a request in work is just computing what this one begins with."""
        if not self._shares(run) or run.every:
            return False
        for other in self.running:
            if other.lease.key == run.lease.key and other.length < other.prompt.size:
                n = common(other.prompt[:-1], run.prompt[:-1])
                if n - other.length >= 2 * SHORTEST and self._shares(other):
                    return True
        return False

    def _join(self, run: Run) -> bool:
        prefix, known, source = None, 0, None
        whole = run.total
        if self._shares(run) and not run.every:
            # The last token is always run: its logits are what comes next.
            ids = run.first_ids(whole - 1)
            prefix, known = self.prefixes.find(run.lease.key, ids)
            for other in self.running:
                if other.lease.key == run.lease.key and self._shares(other):
                    n = min(common(other.prompt, ids), other.length)
                    if n > max(known, SHORTEST - 1):
                        prefix, known, source = None, n, other.extent
        need = min(run.most, whole + self.ahead)
        far = min(run.most, whole + self.far)
        spare = self._spare() - rounded(need)
        if spare < 0:
            return False
        extent: Extent | None = None
        if prefix is None or (known < prefix.ids.size and prefix.extent.size <= spare):
            extent = self._room(far, need, prefix)
            if extent is not None and known:
                source = prefix.extent if prefix is not None else source
                assert source is not None
                self.arena.copy(source.start, extent.start, known)
        if extent is None and prefix is not None:
            extent = self._adopt(prefix, known, far, need)
        if extent is None:
            return False
        run.slot, run.extent, run.length = self._free.pop(), extent, known
        self.arena.place(run.slot, extent, known)
        self.running.append(run)
        return True

    def _adopt(self, prefix: Prefix, known: int, far: int, need: int) -> Extent | None:
        """The extent of a prefix, of which `known` rows count, long enough now; None where there is
        no room."""
        extent = self.prefixes.release(prefix)
        self.arena.shrink(extent, known)
        if self._lengthen(extent, far, need, known):
            return extent
        self.prefixes.add(Prefix(prefix.key, prefix.ids[:known], extent))
        return None

    # ---- memory -------------------------------------------------------------------------------

    def _spare(self) -> int:
        """Rows that a request may have that joins: those that are free or prefixes', but for what
        those in work are about to need."""
        soon = 0
        for run in self.running:
            assert run.extent is not None
            soon += max(0, rounded(min(run.most, run.total + self.ahead)) - run.extent.size)
        return self.arena.rows - self.arena.used + self.prefixes.rows - soon

    def _room(self, far: int, need: int, spared: Prefix | None) -> Extent | None:
        """An extent of `far` rows if they are free, else of at least `need`, for which prefixes go,
        all but `spared`; None where there is none."""
        extent = self.arena.take(far) or self.arena.take(need)
        while extent is None and self.prefixes.drop_oldest(spared):
            extent = self.arena.take(need)
        if extent is None and self._compact(need):
            extent = self.arena.take(need)
        return extent

    def _lengthen(self, extent: Extent, far: int, need: int, filled: int) -> bool:
        """Makes an extent longer: `far` rows if they are free, else at least `need`, for which
        prefixes go. The first `filled` rows are kept."""
        while True:
            if self.arena.extend(extent, far) or self.arena.extend(extent, need):
                return True
            to = self.arena.take(need)
            if to is not None:
                self.arena.move(extent, to, filled)
                return True
            if not self.prefixes.drop_oldest():
                return self._compact(need - extent.size, extent) and self.arena.extend(extent, need)

    def _compact(self, rows: int, behind: Extent | None = None) -> bool:
        """Makes one piece of what is free, if there are so many rows of it."""
        if self.arena.rows - self.arena.used < rows:
            return False
        self.arena.compact(behind)
        for run in self.running:
            assert run.extent is not None
            self.arena.place(run.slot, run.extent, run.length)
        return True

    # ---- growing and leaving ------------------------------------------------------------------

    def grow(self, run: Run, rows: int, waiting: Waiting) -> bool:
        """Gives a request in work room for `rows` rows, others' memory where it must be; False if
        it was the one that had to give its memory up."""
        extent = run.extent
        assert extent is not None
        if rows <= extent.size:
            return True
        far = min(run.most, max(rows, min(2 * extent.size, rows + self.far)))
        while not self._lengthen(extent, far, rows, run.length):
            last = self.running[-1]
            self.preempt(last, waiting)
            if last is run:
                return False
        self.arena.place(run.slot, extent, run.length)
        return True

    def preempt(self, run: Run, waiting: Waiting) -> None:
        """A request gives its memory up, to be computed again; it waits at the head of the queue.
        What nobody takes in the meantime it finds again as a prefix."""
        self._leave(run)
        run.preempted += 1
        self.preemptions += 1
        run.length = 0
        run.pooled = None
        if run.echo is not None:
            run.echo = []
        waiting.put_back(run)

    def end(self, run: Run) -> None:
        """A request leaves; what it has computed stays as a prefix as long as there is room."""
        self._leave(run)

    def forget(self) -> None:
        """Nothing that was computed counts any more; those in work are gone."""
        while self.running:
            run = self.running[-1]
            run.length = 0
            self._leave(run)
        while self.prefixes.drop_oldest():
            pass

    def _leave(self, run: Run) -> None:
        extent = run.extent
        assert extent is not None
        self.running.remove(run)
        self._free.append(run.slot)
        run.slot, run.extent = -1, None
        if self._shares(run):
            self.prefixes.add(Prefix(run.lease.key, run.first_ids(run.length), extent))
        else:
            self.arena.give(extent)
