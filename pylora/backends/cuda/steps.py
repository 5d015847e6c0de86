"""A model's training step as a CUDA graph, recorded the second time its shapes are met.

What changes between two steps of the same shapes is the numbers in one array, which goes to the
device in one copy. Results are copied out of the graph's memory, the gradients in one piece, so a
replay never changes what a caller holds.

The graphs of a model share one pool of memory, as no two of them ever run at a time: it is as large
as the largest step's own needs and is taken from CuPy's pool. It is given up with the graphs: when
another adapter is attached, or when memory runs out. PYLORA_CUDA_GRAPHS=0 switches graphs off.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.backends.cuda.marshal import ALIGN, PlacedSeqs, aligned, check_seqs, longest
from pylora.ops.repeat import Results, Work
from pylora.types import Array, Seqs

GRAPHS = 8  # that are kept for a model, the latest ones
_MET = 256  # shapes that are remembered


class _Numbers:
    """A step's numbers: one array on the host, one on the device, and the views of it."""

    def __init__(self, ops: Any, arrays: Sequence[np.ndarray], seqs: Seqs) -> None:
        m = int(seqs.q_start[-1])
        check_seqs(seqs, m, m)
        parts = self._parts(arrays, seqs)
        starts = np.cumsum([0] + [aligned(p.nbytes) for p in parts]).tolist()
        self._host = np.zeros(starts[-1], np.uint8)
        self._views = [self._host[a : a + p.nbytes].view(p.dtype) for a, p in zip(starts, parts)]
        self._write(parts)
        self._device = ops.xp.asarray(self._host)
        views = [self._device[a : a + p.nbytes].view(p.dtype) for a, p in zip(starts, parts)]
        self.arrays, ints = views[:-1], views[-1]
        struct = ops.to.seqs(seqs.k_len.size, ints, *longest(seqs))
        self.seqs = PlacedSeqs(seqs.q_start, seqs.k_start, seqs.k_len, struct, ints)

    @staticmethod
    def _parts(arrays: Sequence[np.ndarray], seqs: Seqs) -> list[np.ndarray]:
        ints = np.concatenate([seqs.q_start, seqs.k_start, seqs.k_len])
        return [*arrays, ints.astype(np.int64, copy=False)]

    def _write(self, parts: Sequence[np.ndarray]) -> None:
        for view, part in zip(self._views, parts, strict=True):
            view[...] = part

    def fill(self, arrays: Sequence[np.ndarray], seqs: Seqs) -> None:
        """Other numbers of the same shapes."""
        self._write(self._parts(arrays, seqs))
        self._device.set(self._host)


@dataclass(eq=False)
class _Graph:
    numbers: _Numbers
    graph: Any
    flat: Array  # most of the results, one behind the other
    results: Results
    workspaces: Any


class CudaSteps:
    """`Repeated` on the CUDA backend. Threads may share it: they replay one after the other."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops
        self._lock = threading.RLock()
        self._stream: Any = None
        self._event: Any = None  # after the last replay
        self._used = 0  # the stream of that
        self._no_graphs = False  # one could not be captured
        self.captures = self.replays = 0
        self._forget()

    def _forget(self) -> None:
        self._met: OrderedDict[Hashable, int | None] = OrderedDict()  # bytes of results; None: no
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._pool: Any = None
        self._held: list[Any] = []  # the pool's memory, which it then cannot give back by itself

    @property
    def nbytes(self) -> int:
        """Device memory that the graphs hold."""
        return 0 if self._pool is None else int(self._pool.total_bytes())

    def clear(self) -> None:
        with self._lock:
            if self._event is not None:
                self._event.synchronize()  # a replay may still use what is let go
            self._event = None
            self._forget()

    # ---- running ------------------------------------------------------------------------------

    def run(self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        if key is None or self._no_graphs or os.environ.get("PYLORA_CUDA_GRAPHS") == "0":
            return self._direct(arrays, seqs, work)
        sizes = tuple((a.dtype.str, a.size) for a in arrays)
        key = (key, sizes, seqs.k_len.size, *longest(seqs), self.ops.tf32)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None:
                if self._met.get(key) is None:
                    return self._first(key, arrays, seqs, work)
                graph = self._capture(key, arrays, seqs, work)
                if graph is None:
                    return self._direct(arrays, seqs, work)
            self._graphs.move_to_end(key)
            return self._replay(graph, arrays, seqs)

    def _direct(self, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work) -> Results:
        try:
            numbers = _Numbers(self.ops, arrays, seqs)
            return work(numbers.arrays, numbers.seqs)
        except MemoryError:  # CuPy's is one
            if not self._graphs:
                raise
        self.clear()
        self.ops.trim()
        numbers = _Numbers(self.ops, arrays, seqs)
        return work(numbers.arrays, numbers.seqs)

    def _first(
        self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work
    ) -> Results:
        """Runs what was not met before: kernels are compiled and tables made now."""
        refused = key in self._met
        results = self._direct(arrays, seqs, work)
        if not refused:
            self._met[key] = sum(aligned(a.nbytes) for a in results.values())
            while len(self._met) > _MET:
                self._met.popitem(last=False)
        return results

    def _replay(self, graph: _Graph, arrays: Sequence[np.ndarray], seqs: Seqs) -> Results:
        stream = self.ops.xp.cuda.get_current_stream()
        if self._event is not None and stream.ptr != self._used:
            stream.wait_event(self._event)
        graph.numbers.fill(arrays, seqs)
        graph.graph.launch(stream=stream)
        flat, first, out = graph.flat.copy(), graph.flat.data.ptr, {}
        for name, a in graph.results.items():
            at = a.data.ptr - first
            if 0 <= at < flat.nbytes:
                out[name] = flat[at : at + a.nbytes].view(a.dtype).reshape(a.shape)
            else:
                out[name] = a.copy()
        self._event, self._used = stream.record(self._event), stream.ptr
        self.replays += 1
        return out

    # ---- capturing ----------------------------------------------------------------------------

    def _capture(
        self, key: Hashable, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work
    ) -> _Graph | None:
        """None where it cannot be: it is then run each time."""
        size = self._met[key]
        assert size is not None
        try:
            graph = self._record(arrays, seqs, work, size)
            if self._graphs and self.nbytes > self.ops.xp.cuda.runtime.memGetInfo()[1] // 2:
                # Steps of many sizes leave gaps between them: this one alone, in memory of its own.
                del graph
                self.clear()
                graph = self._record(arrays, seqs, work, size)
        except MemoryError:
            self.clear()
            self._met[key] = None
            return None
        except Exception as error:  # nothing has run yet: what a capture queues waits
            self.clear()
            self._no_graphs = True
            warnings.warn(
                f"a training step cannot be captured as a CUDA graph ({error}); this model's steps "
                "are launched kernel by kernel from now on, more slowly",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        self._graphs[key] = graph
        while len(self._graphs) > GRAPHS:
            old, _ = self._graphs.popitem(last=False)
            self._met.pop(old, None)
        return graph

    def _record(self, arrays: Sequence[np.ndarray], seqs: Seqs, work: Work, size: int) -> _Graph:
        cuda = self.ops.xp.cuda
        if self._stream is None:
            self._stream = cuda.Stream(non_blocking=True)
        if self._pool is None:
            self._pool = cuda.MemoryPool(self._allocator(cuda.get_current_stream()))
        numbers = _Numbers(self.ops, arrays, seqs)
        with cuda.using_allocator(self._pool.malloc), self._stream:
            flat = self.ops.xp.empty(max(size, ALIGN), np.uint8)
            with self.ops.own_workspace(flat) as workspaces:
                self._stream.begin_capture(cuda.runtime.streamCaptureModeRelaxed)
                try:
                    results = work(numbers.arrays, numbers.seqs)
                finally:
                    graph = self._stream.end_capture()
        self.captures += 1
        return _Graph(numbers, graph, flat, results, workspaces)

    def _allocator(self, stream: Any) -> Any:
        """Memory of CuPy's own pool, of the stream whose steps have used it before."""
        pool, held = self.ops.xp.get_default_memory_pool(), self._held

        def malloc(size: int) -> Any:
            with stream:
                held.append(pool.malloc(size))
            return held[-1]

        return malloc
