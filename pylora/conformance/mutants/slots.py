"""What is kept between calls: slots of mixed batches, seeds, and what threads share."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.keeping import Grads, Keeps
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array


class _Slots(Keeps):
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
class RowsOfRefused(Keeps):
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
class MaskOfLast(Keeps):
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
class MaskKeptByShape(Keeps):
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
class GradientAccumulates(Keeps):
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
