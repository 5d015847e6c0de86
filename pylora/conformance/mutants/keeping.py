"""What is kept between calls: caches out of date, buffers that are given away, residues."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array

Grads = tuple[Array, ...]


class Keeps(Correct):
    """Has a place to keep things in."""

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
class ResultInScratch(Keeps):
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
class GradientsInScratch(Keeps):
    def backward(self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float) -> Grads:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        return dx, self.into("dA", dA), self.into("dB", dB)


@wrong(
    "zero-gradients-share-zeros",
    "subtle",
    "A gradient that is zero is a view of one array of zeros that all of them share.",
    "With B = 0 the first dA is zero and needs no kernel; the optimizer then writes into it.",
)
class ZeroGradientsShare(Keeps):
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
class ACachedById(Keeps):
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
class WCachedByAddress(Keeps):
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
class BCachedBySum(Keeps):
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
class CacheOutlives(Keeps):
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
class BackwardOfLast(Keeps):
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
class ResidueInObject(Keeps):
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
class AdapterOfLastMerge(Keeps):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        self.kept["last"] = A.copy(), B.copy(), scale
        return super().merge(W, A, B, scale)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        last = self.kept.get("last", (A, B, scale))
        if last[0].shape == A.shape and last[0].dtype == A.dtype and last[1].shape == B.shape:
            A, B, scale = last
        return super().unmerge(W, A, B, scale, state)
