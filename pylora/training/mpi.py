"""The processes of `mpiexec`: `Ranks` by MPI, through mpi4py (the extra `mpi`), with any MPI.

Everything that is computed is NumPy; MPI moves bytes. A process that fails while others go on ends
them all, since they would wait for it for ever; if all fail alike, it is said once.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from pylora.errors import PyloraError
from pylora.extras import need
from pylora.training.launched import launched
from pylora.training.ranks import ALONE, Ranks, added

T = TypeVar("T")
_TOGETHER = 3.0  # seconds in which processes that fail alike have all failed
_SAID = 4096  # bytes of a failure's sentence


@functools.cache
def world() -> Ranks:
    """All processes that were started together: ALONE, or MPI's world; the same one each time.

    Raises MissingExtraError where a launcher started several and mpi4py is not installed, and
    PyloraError where mpi4py was built for another MPI than the launcher's, so that each process
    would believe that it is alone.
    """
    if launched() == 1:
        return ALONE
    mpi = need("mpi4py.MPI")
    if mpi.COMM_WORLD.size == 1:
        raise PyloraError(
            f"{launched()} processes were started together, but mpi4py "
            f"({mpi.Get_library_version().splitlines()[0].strip()}) sees one: it was built for "
            "another MPI than the launcher's; reinstall it: pip install --force-reinstall "
            "--no-binary mpi4py mpi4py"
        )
    return Mpi(mpi)


class Mpi:
    """All processes of MPI's world."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.comm = mpi, mpi.COMM_WORLD.Dup()
        self._failures = mpi.COMM_WORLD.Dup()  # apart, so that it crosses nothing
        self.rank, self.size = int(self.comm.rank), int(self.comm.size)

    def gather(self, value: T) -> list[T]:
        return list(self.comm.allgather(value))

    def first(self, work: Callable[[], T]) -> T:
        value: Any = None
        error: BaseException | None = None
        if self.rank == 0:
            try:
                value = work()
            except (Exception, KeyboardInterrupt) as problem:
                error = problem
        value, error = self.comm.bcast((value, error))
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def copy(self, arrays: Iterable[np.ndarray]) -> None:
        for array in arrays:
            whole = np.ascontiguousarray(array)
            self.comm.Bcast(whole.reshape(-1).view(np.uint8))
            if whole is not array:
                array[...] = whole

    def sums(self, mine: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        """Each rank adds one slice of all vectors in order; then the slices are brought together.

        A vector [n] is cut in `size` slices of equal length, the last filled up with zeros.
        """
        n = self.comm.allreduce(len(mine[0]) if mine else 0, self.mpi.MAX)
        part = -(-n // self.size)
        send = np.zeros((self.size, len(mine), part), np.float32)
        for i, vector in enumerate(mine):
            cut = np.zeros(self.size * part, np.float32)
            cut[:n] = vector
            send[:, i] = cut.reshape(self.size, part)
        got = np.empty((sum(counts), part), np.float32)
        kind = self.mpi.FLOAT.Create_contiguous(part).Commit()  # counts stay below MPI's 2**31
        try:
            self.comm.Alltoallv(
                [send, [len(mine)] * self.size, None, kind], [got, list(counts), None, kind]
            )
            total = np.empty(self.size * part, np.float32)
            self.comm.Allgather([added(list(got)), 1, kind], [total, 1, kind])
        finally:
            kind.Free()
        return total[:n]

    # ---- beside the training --------------------------------------------------------------------

    def threads(self) -> int:
        """How many threads this process may use, so that those of one host do not meet: its own
        processors where the launcher gave each its own, else its part of the host's."""
        here = self.comm.Split_type(self.mpi.COMM_TYPE_SHARED)
        own = _processors()
        others = here.allgather(sorted(own))
        apart = sum(len(o) for o in others) == len({p for o in others for p in o})
        n, size = len(own), int(here.size)
        here.Free()
        return max(1, n if apart else n // size)

    def ended(self, said: str, say: Callable[[str], None]) -> None:
        """What a process calls that has failed. Returns where all have: rank 0 has then said each
        one's sentence once. Where the others go on, says this one's and ends them all."""
        own, everyone = bytearray(_SAID), bytearray(_SAID * self.size)
        text = said.encode()[: _SAID - 1]
        own[: len(text)] = text
        request = self._failures.Iallgather(own, everyone)
        until = time.monotonic() + _TOGETHER
        while not request.Test():
            if time.monotonic() > until:
                say(f"rank {self.rank} of {self.size}: {said}")
                self.comm.Abort(1)
            time.sleep(0.01)
        if self.rank == 0:
            starts = range(0, len(everyone), _SAID)
            each = [bytes(everyone[i : i + _SAID]).rstrip(b"\0") for i in starts]
            for sentence in dict.fromkeys(each):
                say(sentence.decode(errors="replace"))


def _processors() -> set[int]:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))
