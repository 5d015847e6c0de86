"""Several processes that train one adapter together: who computes what, and sums in one order.

Data parallel over micro-batches. Floating-point addition is not associative, so the processes do
not reduce what they have, as an all-reduce would: each gets its own slice of *every* micro-batch's
gradient, adds the slices in the order of the micro-batches, and gives the sum to all. The result
has the bits of one process that computes the micro-batches one after the other, whatever the number
of processes. As many bytes travel as in a ring all-reduce, if each has one micro-batch.

`Ranks` is what a way of communicating must offer; `ALONE` is one process. mpi.py is MPI.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from pylora.errors import ConfigError
from pylora.model.linear import Grads, LoRAGrad

T = TypeVar("T")


class Ranks(Protocol):
    """A fixed number of processes, each with a rank, that call the same methods in the same
    order."""

    rank: int  # of this process, 0 .. size - 1
    size: int

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on every process. For small things."""

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, where alone it runs; raises on all what it raises there."""

    def copy(self, arrays: Iterable[np.ndarray]) -> None:
        """Makes each array what it is on rank 0, in place."""

    def sums(self, mine: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        """The sum of all vectors of all ranks, in order of rank, then of `mine`, on every rank.

        Vectors are float32 [n], n the same everywhere; counts[r] is how many rank r has.
        """


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, value: T) -> list[T]:
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        return work()

    def copy(self, arrays: Iterable[np.ndarray]) -> None:
        pass

    def sums(self, mine: Sequence[np.ndarray], counts: Sequence[int]) -> np.ndarray:
        return added(mine)


ALONE: Ranks = Alone()


def added(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """((v0 + v1) + v2) + ..., a new array."""
    total: np.ndarray = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total


def shares(n: int, size: int) -> list[range]:
    """The numbers 0 .. n - 1 in one stretch for each rank, of nearly equal length, in order."""
    edges = [(n * r + size - 1) // size for r in range(size + 1)]
    return [range(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def check_share(ranks: Ranks, accumulation: int) -> None:
    """ConfigError where a step has fewer micro-batches than there are processes."""
    if accumulation < ranks.size:
        raise ConfigError(
            f"{ranks.size} processes, but a step has {accumulation} micro-batch"
            f"{'es' if accumulation > 1 else ''}: {ranks.size - accumulation} would have nothing "
            f"to do; give --accumulation {ranks.size} (or a multiple of it), or start "
            f"{accumulation}"
        )


def same_everywhere(ranks: Ranks, identity: Mapping[str, Any]) -> None:
    """ConfigError on every rank, naming what some rank has otherwise than rank 0."""
    everyone = ranks.gather(dict(identity))
    for rank, there in enumerate(everyone):
        odd = [n for n in everyone[0] | there if there.get(n) != everyone[0].get(n)]
        if odd:
            raise ConfigError(
                f"rank {rank} of {ranks.size} has another {', another '.join(odd[:3])} than rank "
                "0; every process must be given the same model, data and settings"
            )


def total_gradients(
    ranks: Ranks, mine: Sequence[Grads], counts: Sequence[int], like: Mapping[str, Any], ops: Any
) -> Grads:
    """The sum of every rank's micro-batches' gradients, each array in the order of the
    micro-batches; those that a micro-batch does not have (experts that it did not choose) are
    passed over, as one process would.

    `like`: the arrays that are trained, by parameter name ("<module path>.<field of LoRAGrad>").
    """
    names = [(p, f) for p, _, f in (name.rpartition(".") for name in like)]
    shapes = [tuple(array.shape) for array in like.values()]
    sizes = [int(np.prod(s)) for s in shapes]
    found = [[_array(grads, p, f) for p, f in names] for grads in mine]
    there = [[a is not None for a in row] for row in found]
    everyone = [row for rows in ranks.gather(there) for row in rows]
    columns = list(zip(*everyone, strict=True))
    out: Grads = {}
    # Arrays that every micro-batch has travel as one vector; the few others on their own.
    common = [i for i, column in enumerate(columns) if all(column)]
    if common:
        vectors = [_flat([row[i] for i in common], ops) for row in found]
        vector = ranks.sums(vectors, counts)
        at = 0
        for i in common:
            _put(out, names[i], vector[at : at + sizes[i]].reshape(shapes[i]), ops)
            at += sizes[i]
    for i in (i for i, column in enumerate(columns) if any(column) and not all(column)):
        own = [_flat([row[i]], ops) for row in found if row[i] is not None]
        total = ranks.sums(own, ranks.gather(len(own)))
        _put(out, names[i], total.reshape(shapes[i]), ops)
    return out


def _array(grads: Grads, path: str, field: str) -> Any:
    return getattr(grads[path], field) if path in grads else None


def _flat(arrays: Sequence[Any], ops: Any) -> np.ndarray:
    parts = [ops.to_numpy(a).reshape(-1) for a in arrays]
    return np.concatenate(parts).astype(np.float32, copy=False)


def _put(grads: Grads, name: tuple[str, str], value: np.ndarray, ops: Any) -> None:
    path, field = name
    if path not in grads:
        grads[path] = LoRAGrad(None, None)
    setattr(grads[path], field, ops.asarray(np.ascontiguousarray(value)))
