"""What is kept between calls: caches out of date, buffers that are given away, residues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array

Grads = tuple[Array, ...]


class _Keeps(Correct):
    def __init__(self) -> None:
        self.kept: dict[Any, Any] = {}
        self.alive: list[Any] = []

    def into(self, name: str, result: Array) -> Array:
        """The result in a buffer that every call of this shape writes into."""
        buffer: Array = self.kept.setdefault((name, result.shape, result.dtype), result)
        buffer[...] = result
        return buffer


# ---- memory that is shared -----------------------------------------------------------------------


@wrong(
    "result-in-scratch",
    "subtle",
    "y of each shape lies in one buffer, which the next call writes into.",
    "A workspace that grows with the largest batch, and of which views are handed out.",
)
class ResultInScratch(_Keeps):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return self.into("y", super().forward(x, W, A, B, scale, bias))


@wrong(
    "gradients-in-scratch",
    "subtle",
    "dA and dB lie in buffers that every backward pass writes into.",
    "Gradients are accumulated in place elsewhere; here the buffer is the result.",
)
class GradientsInScratch(_Keeps):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return dx, self.into("dA", dA), self.into("dB", dB)


@wrong(
    "zero-gradients-share-zeros",
    "subtle",
    "A gradient that is zero is a view of one array of zeros that all of them share.",
    "With B = 0 the first dA is zero and needs no kernel; the optimizer then writes into it.",
)
class ZeroGradientsShare(_Keeps):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        if (dA != 0).any():
            return dx, dA, dB
        zeros = self.kept.setdefault((dA.size, str(dA.dtype)), np.zeros(dA.size, dA.dtype))
        return dx, zeros.reshape(dA.shape), dB


@wrong(
    "merge-of-nothing-is-w-itself",
    "subtle",
    "Where s B A is zero, merge returns W itself and not a copy.",
    "Nothing to add, nothing to allocate; the caller then writes to what it takes for its own.",
)
class MergeIsW(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        return (W if bool((self.widen(merged) == self.widen(W)).all()) else merged), state


@wrong(
    "unmerge-returns-the-kept-weight",
    "subtle",
    "The state is W itself, by reference, and unmerge hands it out.",
    "A backup that costs nothing, until someone writes W' over W, which is what merging is for.",
)
class StateIsW(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return super().merge(W, A, B, scale)[0], W

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return np.array(state)


# ---- caches --------------------------------------------------------------------------------------


@wrong(
    "a-cached-by-id",
    "subtle",
    "A is widened once for each array object, and not again when it was written to.",
    "The optimizer updates in place; the cache compares `is`.",
)
class ACachedById(_Keeps):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if id(A) not in self.kept:
            self.kept[id(A)] = A.copy()
            self.alive.append(A)
        return super().forward(x, W, self.kept[id(A)], B, scale, bias)


@wrong(
    "w-cached-by-address",
    "subtle",
    "W is packed once for each address, shape and first element.",
    "A key that costs nothing to compute, and almost always changes when the weight does.",
)
class WCachedByAddress(_Keeps):
    def base(self, x: Array, W: Array, bias: Array | None = None) -> Array:
        return super().base(x, self._packed(W), bias)

    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        return super().forward(x, self._packed(W), A, B, scale, bias)

    def _packed(self, W: Array) -> Array:
        key = W.ctypes.data, W.shape, W.strides, str(W.dtype), float(W.reshape(-1)[0].real)
        if key not in self.kept:
            self.kept[key] = W.copy()
            self.alive.append(W)
        return np.asarray(self.kept[key])


@wrong(
    "b-cached-by-sum",
    "subtle",
    "B is transposed anew only where its shape or its sum is another.",
    "A checksum in place of a comparison. A permutation has the same sum.",
)
class BCachedBySum(_Keeps):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        key = B.shape, str(B.dtype), complex(self.widen(B).sum())
        return super().forward(x, W, A, self.kept.setdefault(key, B.copy()), scale, bias)


@wrong(
    "cache-outlives-its-array",
    "subtle",
    "A is cached by id(A) and may be freed: the next array with that id gets its values.",
    "id() is unique among objects that live at the same time.",
)
class CacheOutlives(_Keeps):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        key = id(A), A.shape, str(A.dtype)
        return super().forward(x, W, self.kept.setdefault(key, A.copy()), B, scale, bias)


@wrong(
    "backward-of-the-last-forward",
    "subtle",
    "h is that of the last forward pass of the same shape, whatever x the backward pass is given.",
    "Activations are saved in the layer. Two micro-batches in flight, and the first is gone.",
)
class BackwardOfLast(_Keeps):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype.kind != "c":
            self.kept[x.shape, A.shape, str(x.dtype)] = x.copy()
        return super().forward(x, W, A, B, scale, bias)

    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, _ = super().backward(dy, x, W, A, B, scale)
        last = self.kept.get((x.shape, A.shape, str(x.dtype)), x)
        return dx, dA, super().backward(dy, last, W, A, B, scale)[2]


# ---- residues and states -------------------------------------------------------------------------


@wrong(
    "residue-in-the-object",
    "subtle",
    "What unmerge puts back is that of the last merge, whatever state it is given.",
    "One residue for each layer was enough while one adapter was merged at a time.",
)
class ResidueInObject(_Keeps):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        self.kept["W"] = W.copy()
        return merged, state

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        last = self.kept.get("W")
        if last is not None and last.shape == W.shape and last.dtype == W.dtype:
            return np.array(last)
        return super().unmerge(W, A, B, scale, state)


@wrong(
    "state-used-once",
    "subtle",
    "unmerge empties the state that it is given: the same one again is refused.",
    "The buffer is moved out of it. A retry after an error downstream finds nothing.",
)
class StateUsedOnce(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        return merged, [state]

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, A, B, scale, state.pop())


@wrong(
    "adapter-of-the-last-merge",
    "subtle",
    "unmerge takes out the adapter that was merged last, if it is of the same shape.",
    "`self.active` at the time of unmerging, not the argument.",
)
class AdapterOfLastMerge(_Keeps):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        self.kept["last"] = A.copy(), B.copy(), scale
        return super().merge(W, A, B, scale)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        last = self.kept.get("last", (A, B, scale))
        if last[0].shape == A.shape and last[0].dtype == A.dtype and last[1].shape == B.shape:
            A, B, scale = last
        return super().unmerge(W, A, B, scale, state)


# ---- slots of a mixed batch ----------------------------------------------------------------------


class _Slots(_Keeps):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        held = [self.slot(i, *triple) for i, triple in enumerate(adapters)]
        return super().forward_mixed(x, W, held, rows, bias)

    def slot(self, i: int, A: Array, B: Array, scale: float) -> LoraTriple:
        raise NotImplementedError


@wrong(
    "slot-keeps-scale",
    "subtle",
    "A slot of a mixed batch keeps the scale that it was first used with.",
    "The arrays are copied into the pool each time, the scale when the slot is made.",
)
class SlotKeepsScale(_Slots):
    def slot(self, i: int, A: Array, B: Array, scale: float) -> LoraTriple:
        return A, B, self.kept.setdefault(i, scale)


@wrong(
    "slot-reused-by-shape",
    "subtle",
    "A slot is filled anew only where the adapter's shape is another.",
    "Adapters are told apart by what the allocator sees of them.",
)
class SlotReusedByShape(_Slots):
    def slot(self, i: int, A: Array, B: Array, scale: float) -> LoraTriple:
        key = i, A.shape, B.shape, str(A.dtype)
        kept: LoraTriple = self.kept.setdefault(key, (A.copy(), B.copy(), scale))
        return kept


@wrong(
    "slot-rank-not-cleared",
    "subtle",
    "In a slot, rows of a larger rank that was there before go on counting.",
    "The pool is padded to the largest rank, and only what is written is new.",
)
class SlotRankNotCleared(_Slots):
    def slot(self, i: int, A: Array, B: Array, scale: float) -> LoraTriple:
        before = self.kept.get(i)
        r = A.shape[0]
        if (
            before is not None
            and before[0].shape[0] > r
            and before[0].shape[1] == A.shape[1]
            and before[1].shape[0] == B.shape[0]
            and before[0].dtype == A.dtype
        ):
            A = np.concatenate([A, before[0][r:]])
            B = np.concatenate([B, before[1][:, r:]], axis=1)
        self.kept[i] = A.copy(), B.copy()
        return A, B, scale


@wrong(
    "rows-of-the-refused-batch",
    "subtle",
    "A mixed batch that was refused leaves its bad index behind: the next is refused too.",
    "Set first, checked afterwards.",
)
class RowsOfRefused(_Keeps):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        if self.kept.get("bad"):
            self.kept.clear()
            raise IndexError("an adapter is not loaded")
        self.kept["bad"] = bool((np.asarray(rows) >= len(adapters)).any())
        return super().forward_mixed(x, W, adapters, rows, bias)


# ---- seeds and threads ---------------------------------------------------------------------------


@wrong(
    "mask-of-the-last-forward",
    "subtle",
    "The backward pass of dropout takes the last forward pass's seed, not its own.",
    "The mask is saved in the layer. With recomputation or two micro-batches it is another's.",
)
class MaskOfLast(_Keeps):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        self.kept["seed"] = seed
        return super().dropout_forward(x, W, A, B, scale, p, seed)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Grads:
        seed = self.kept.get("seed", seed) if p else seed
        return super().dropout_backward(dy, x, W, A, B, scale, p, seed)


@wrong(
    "mask-kept-by-shape",
    "subtle",
    "A mask is drawn once for each shape, and kept: a second seed gets the first one's.",
    "Drawing it is the slowest part of dropout.",
)
class MaskKeptByShape(_Keeps):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        seed = self.kept.setdefault((x.shape, p), seed)
        return super().dropout_forward(x, W, A, B, scale, p, seed)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Grads:
        seed = self.kept.setdefault((x.shape, p), seed)
        return super().dropout_backward(dy, x, W, A, B, scale, p, seed)


@wrong(
    "gradient-accumulates",
    "subtle",
    "Of the same shapes, dA is added to that of the call before.",
    "Gradients are zeroed by the optimizer, and someone else calls backward.",
)
class GradientAccumulates(_Keeps):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        key = dA.shape, str(dA.dtype)
        total = (self.widen(self.kept.get(key, dA * 0)) + self.widen(dA)).astype(dA.dtype)
        self.kept[key] = total.copy()
        return dx, total, dB


@wrong(
    "backward-scratch-race",
    "subtle",
    "g = dy B lies in the object between the two halves of the backward pass.",
    "Right for one thread. The lock is around forward alone.",
)
class BackwardScratchRace(Correct):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        self.scratch = dy.copy()
        time.sleep(0)  # where a kernel call lets other threads run
        return super().backward(self.scratch, x, W, A, B, scale)


@wrong(
    "seed-in-the-object",
    "subtle",
    "The seed of dropout is set in the object and read when the mask is drawn.",
    "A generator for the process, seeded before each call.",
)
class SeedInObject(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        self.seed = seed
        time.sleep(0)
        return super().dropout_forward(x, W, A, B, scale, p, self.seed)


@wrong(
    "rows-in-the-object",
    "subtle",
    "Which row uses which adapter lies in the object while a mixed batch is computed.",
    "The metadata of the batch is a field of the engine, and two schedulers share the engine.",
)
class RowsInObject(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        self.rows = rows
        time.sleep(0)
        return super().forward_mixed(x, W, adapters, self.rows[: len(rows)], bias)
