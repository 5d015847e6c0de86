"""The operation `llama` on a GPU: a step of decoding as few launches, replayed as a CUDA graph.

All numbers of a step (ids, positions, cache rows, sequences) go to the device in one copy; each
group of projections is one segmented product. A step of one token for each sequence that looks like
the one before (the same sequences, adapters, cache and tables; the longest sequence in the same
power of two) is captured the second time it is met and replayed from then on: what changes between
steps is the numbers in that one array. PYLORA_CUDA_GRAPHS=0 switches graphs off.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pylora.backends.cuda.marshal import check_seqs, longest
from pylora.errors import RangeError
from pylora.ops.dora import factor, measured, rescale
from pylora.ops.llama import NARROW, LlamaWeights, Step, bias_of, embedding_bias
from pylora.types import Array, LoRA, Norm, Projection

GRAPHS = 16  # that are kept for a model, the latest ones


@dataclass(eq=False)
class CudaAdapter:
    """An adapter's arrays on the device, and the structs that point to them."""

    lora: dict[int, LoRA]
    structs: dict[int, Any]
    bias: dict[int, Array]
    columns: Array | None  # scale * A of the embedding, [vocab, r]
    packed_B: Any
    embedding_bias: Array | None
    nbytes: int
    factor: dict[int, Array] = field(default_factory=dict)  # of modules with a magnitude
    embedding_factor: Array | None = None
    keep: list[Any] = field(default_factory=list)

    @property
    def rescales(self) -> bool:
        """Whether something has a magnitude."""
        return bool(self.factor) or self.embedding_factor is not None


@dataclass(eq=False)
class _Numbers:
    """A step's integers: one array on the host, one on the device, and the views of it."""

    host: np.ndarray
    device: Array
    ids: Array
    position: Array
    rows: Array
    output: Array
    seqs: Any  # pylora_cuda_seqs


@dataclass(eq=False)
class _Graph:
    numbers: _Numbers
    graph: Any = None  # None: the step was met once
    logits: Any = None
    pool: Any = None  # the memory of everything in it
    keep: Any = None


class CudaLlama:
    """`LlamaOp` on the CUDA backend."""

    def __init__(self, ops: Any, weights: LlamaWeights) -> None:
        self.ops, self.weights = ops, weights
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._rows: dict[tuple[int, int], Array] = {}
        self._stream: Any = None
        self._lock = threading.Lock()  # threads share the graphs and the stream that captures
        self._no_graphs = False  # one could not be captured
        self.replays = 0

    # ---- what is built once -------------------------------------------------------------------

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> CudaAdapter:
        ops, w = self.ops, self.weights
        out = CudaAdapter({}, {}, {}, None, None, None, 0)
        for number, given in modules.items():
            lora = self._copy(given)
            W, own = w.module(number)
            if lora.rank:
                out.lora[number] = lora
                out.structs[number], keep = ops.to.lora(lora, None, *W.shape)
                out.keep.append(keep)
            out.nbytes += int(lora.A.nbytes + lora.B.nbytes)
            if lora.magnitude is not None:
                out.factor[number] = factor(measured(ops, W, lora), ops.xp)
                out.nbytes += int(out.factor[number].nbytes)
            bias = bias_of(lora, own)
            if bias is not None:
                out.bias[number] = bias.copy()
                out.nbytes += int(bias.nbytes)
        if embedding is not None:
            lora = self._copy(embedding)
            out.embedding_bias = embedding_bias(lora)
            if lora.magnitude is not None:
                out.embedding_factor = factor(lora, ops.xp)
            out.nbytes += int(lora.A.nbytes + lora.B.nbytes)
            if lora.rank and bool((lora.A != 0).any()) and bool((lora.B != 0).any()):
                columns = lora.A.dtype.type(lora.scale) * lora.A
                out.columns = ops.xp.ascontiguousarray(columns.T)
                out.packed_B = ops.pack(lora.B)
        return out

    def _copy(self, lora: LoRA) -> LoRA:
        arrays = (lora.A, lora.B, lora.bias, lora.base_bias, lora.magnitude, lora.norm)
        A, B, *others = (None if a is None else self.ops.place(a).copy() for a in arrays)
        return LoRA(A, B, lora.scale, 0.0, *others)

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        return tuple(k), tuple(v)

    # ---- a step -------------------------------------------------------------------------------

    def forward(self, cache: Any, step: Step) -> Array:
        """Logits [outputs, vocab] of a step."""
        w, k_rows = self.weights, cache[0][0].shape[0] if cache[0] else 0
        check_seqs(step.seqs, step.ids.size, k_rows)
        for what, a, n in (
            ("token id", step.ids, w.embedding.shape[0]),
            ("position", step.position, step.cos.shape[0]),
            ("cache row", step.rows, k_rows),
            ("output", step.output, step.ids.size),
        ):
            if a.size and (int(a.min()) < 0 or int(a.max()) >= n):
                raise RangeError(f"a {what} is outside of 0 .. {n - 1}")
        max_q, most = longest(step.seqs)
        max_k = 1 << max(most - 1, 0).bit_length()
        key = self._key(cache, step, max_q, max_k)
        if key is None:
            return self._run(cache, step, self._numbers(step, max_q, max_k))
        with self._lock:
            entry = self._graphs.get(key)
            if entry is not None:
                self._graphs.move_to_end(key)
        if entry is None:
            entry = _Graph(self._numbers(step, max_q, max_k))
            with self._lock:
                self._graphs[key] = entry
                while len(self._graphs) > GRAPHS:
                    self._graphs.popitem(last=False)
            return self._run(cache, step, entry.numbers)
        self._fill(entry.numbers, step)
        if entry.graph is None:
            try:
                with self._lock:
                    self._capture(entry, cache, step)
            except Exception as error:  # nothing has run yet: what a capture queues waits
                self._no_graphs = True
                warnings.warn(
                    f"a step of decoding cannot be captured as a CUDA graph ({error}); this "
                    "model's steps are launched kernel by kernel from now on, more slowly",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return self._run(cache, step, entry.numbers)
        entry.graph.launch(stream=self.ops.xp.cuda.get_current_stream())
        self.replays += 1
        return entry.logits.copy()  # the next replay writes there

    def _key(self, cache: Any, step: Step, max_q: int, max_k: int) -> Any:
        """What two steps have in common that may share a graph; None for one that is no graph's:
        a prompt, whose shape hardly comes again, and one whose normed rows are wanted."""
        if self._no_graphs or os.environ.get("PYLORA_CUDA_GRAPHS") == "0" or max_q != 1:
            return None
        if step.want_normed:
            return None
        if step.output.size == 0 or any(
            a is not None and ((a.embedding_bias is not None and a.packed_B is None) or a.rescales)
            for a in step.adapters
        ):
            return None
        return (
            step.ids.size,
            step.seqs.k_len.size,
            step.output.size,
            tuple(step.start.tolist()),
            tuple(np.searchsorted(step.output, step.start).tolist()),
            tuple(id(a) for a in step.adapters),
            id(cache),
            step.cos.data.ptr,
            max_k,
        )

    # ---- the numbers --------------------------------------------------------------------------

    def _numbers(self, step: Step, max_q: int, max_k: int) -> _Numbers:
        ops, n, m = self.ops, step.seqs.k_len.size, step.ids.size
        parts = self._parts(step)
        host = np.concatenate(parts)
        device = ops.xp.asarray(host)
        cut = np.cumsum([0] + [p.size for p in parts])
        views = [device[a:b] for a, b in zip(cut, cut[1:])]
        seqs = ops.to.seqs(n, device[cut[4] :], max_q, max_k)
        ids, position, rows, output = views[:4]
        assert ids.size == m
        return _Numbers(host, device, ids, position, rows, output, seqs)

    @staticmethod
    def _parts(step: Step) -> list[np.ndarray]:
        s = step.seqs
        return [step.ids, step.position, step.rows, step.output, s.q_start, s.k_start, s.k_len]

    def _fill(self, numbers: _Numbers, step: Step) -> None:
        np.concatenate(self._parts(step), out=numbers.host)
        numbers.device.set(numbers.host)

    # ---- capturing ----------------------------------------------------------------------------

    def _capture(self, entry: _Graph, cache: Any, step: Step) -> None:
        """Everything that the step allocates comes from a pool of the graph's own, so that no other
        array is ever where a replay writes."""
        cuda = self.ops.xp.cuda
        if self._stream is None:
            self._stream = cuda.Stream(non_blocking=True)
        pool = cuda.MemoryPool()
        with cuda.using_allocator(pool.malloc), self._stream:
            with self.ops.own_workspace() as workspace:
                self._stream.begin_capture(cuda.runtime.streamCaptureModeRelaxed)
                try:
                    entry.logits = self._run(cache, step, entry.numbers)
                finally:
                    graph = self._stream.end_capture()
        entry.graph, entry.pool = graph, pool
        entry.keep = cache, step.adapters, step.cos, step.sin, workspace

    # ---- the model ----------------------------------------------------------------------------

    def _run(self, cache: Any, step: Step, at: _Numbers) -> Array:
        ops, w = self.ops, self.weights
        start = step.start.tolist()
        x = self._embed(step, at)
        for i, (layer, k, v) in enumerate(zip(w.layers, *cache, strict=True)):
            first = w.starts[i]
            normed, _ = ops.norm_forward(x, layer.input_norm, w.dtype)
            q, key, value = self._linear(normed, start, step, (first, first + 1, first + 2))
            q = self._turn(q, layer.q_norm, step, at)
            ops.put_rows(k, at.rows, self._turn(key, layer.k_norm, step, at))
            ops.put_rows(v, at.rows, value)
            attn = replace(w.attn, window=layer.window)
            q, keys, values = ops.read_qkv(q, k, v, attn)
            o = ops.empty(q.shape, np.float32 if w.dtype is None else w.dtype)
            lse = ops.empty((q.shape[0], attn.heads))
            ops.attend(q, keys, values, at.seqs, attn, o, lse)
            (x,) = self._linear(o, start, step, (first + 3,), residual=x)
            normed, _ = ops.norm_forward(x, layer.mid_norm, w.dtype)
            gate, up = self._linear(normed, start, step, (first + 4, first + 5))
            product = ops.swiglu_forward(gate, up, dtype=w.dtype)
            (x,) = self._linear(product, start, step, (first + 6,), residual=x)
        x = ops.take_rows(x, at.output)
        if step.want_normed:
            step.normed, _ = ops.norm_forward(x, w.norm)
        normed, _ = ops.norm_forward(x, w.norm, w.dtype)
        outputs = np.searchsorted(step.output, step.start).tolist()
        (logits,) = self._linear(normed, outputs, step, (w.head_number,))
        return logits

    def _embed(self, step: Step, at: _Numbers) -> Array:
        ops = self.ops
        x = ops.embedding_forward(at.ids, self.weights.embedding)
        for adapter, a, b in zip(step.adapters, step.start.tolist(), step.start.tolist()[1:]):
            if adapter is None or a == b:
                continue
            if adapter.embedding_factor is not None:
                self._rescaled_embedding(x, adapter, a, b, at)
            elif adapter.packed_B is not None:
                h = ops.take_rows(adapter.columns, at.ids[a:b])
                y, _ = ops.lora_forward(
                    h, adapter.packed_B, adapter.embedding_bias, residual=x[a:b]
                )
                ops.put_rows(x, self._consecutive(a, b), y)
            elif adapter.embedding_bias is not None:
                x[a:b] += adapter.embedding_bias
        return x

    def _rescaled_embedding(
        self, x: Array, adapter: CudaAdapter, a: int, b: int, at: _Numbers
    ) -> None:
        ops, y = self.ops, x[a:b]
        if adapter.packed_B is not None:
            h = ops.take_rows(adapter.columns, at.ids[a:b])
            y, _ = ops.lora_forward(h, adapter.packed_B, residual=y)
        ops.put_rows(x, self._consecutive(a, b), y * adapter.embedding_factor)

    def _consecutive(self, a: int, b: int) -> Array:
        """The row numbers a .. b-1 on the device; kept, as a graph may not make them."""
        if (a, b) not in self._rows:
            self._rows[a, b] = self.ops.index(np.arange(a, b))
        return self._rows[a, b]

    def _turn(self, x: Array, norm: Norm | None, step: Step, at: _Numbers) -> Array:
        ops, w = self.ops, self.weights
        D = w.attn.head_dim
        if norm is not None:
            heads, _ = ops.norm_forward(x.reshape(-1, D), norm)
            x = heads.reshape(x.shape)
        return ops.rope(x, step.cos, step.sin, at.position, D, dtype=w.dtype)

    def _linear(
        self,
        x: Array,
        start: Sequence[int],
        step: Step,
        numbers: tuple[int, ...],
        residual: Array | None = None,
    ) -> list[Array]:
        """Some modules of one x [m, k]: y [m, d] of each, in one call where the biases are the
        modules' own."""
        ops, w = self.ops, self.weights
        x = ops.to.read("x", x, None, None)
        parts: list[Any] = []
        for n in numbers:
            W, bias = w.module(n)
            dtype = w.dtype if w.role(n) in NARROW else None
            p = Projection(W, bias, None, None, residual, dtype)
            structs = [
                ops.ffi.NULL if a is None else a.structs.get(n, ops.ffi.NULL) for a in step.adapters
            ]
            parts.append((p, structs, None))
        own = [a for a in step.adapters if a is not None]
        if not any(n in a.bias or n in a.factor for a in own for n in numbers):
            found: list[Array] = ops.segmented(x, parts, start)
            return found
        pieces = []
        for i, (a, b) in enumerate(zip(start, start[1:])):
            adapter = step.adapters[i]
            if a == b:
                continue
            some, wholes = [], []
            for n, (p, structs, _) in zip(numbers, parts):
                bias = p.bias if adapter is None else adapter.bias.get(n, p.bias)
                rest = None if residual is None else residual[a:b]
                whole = replace(p, bias=bias, residual=rest)
                alone = replace(p, bias=None, residual=None, dtype=None)
                f = None if adapter is None else adapter.factor.get(n)
                wholes.append((whole, f))
                some.append((whole if f is None else alone, [structs[i]], None))
            ys = ops.segmented(x[a:b], some, None)
            for j, (whole, f) in enumerate(wholes):
                if f is not None:
                    ys[j] = rescale(ops, ys[j], f, whole.bias, whole.residual, whole.dtype)
            pieces.append(((a, b), ys))
        outputs = []
        for j, (p, _, _) in enumerate(parts):
            y = ops.empty((x.shape[0], p.W.shape[0]), np.float32 if p.dtype is None else p.dtype)
            for (a, b), ys in pieces:
                ops.put_rows(y, self._consecutive(a, b), ys[j])
            outputs.append(y)
        return outputs
