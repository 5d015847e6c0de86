"""merge and unmerge of one weight."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.numerics import to_bfloat16
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array


@wrong(
    "merge-without-scale",
    "gross",
    "merge adds B A without the scale; unmerge takes the same away.",
    "A round trip hides it: only the merged model's output shows it.",
    "hao-ai-lab/FastVideo#870",
)
class MergeWithoutScale(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return super().merge(W, A, B, 1.0)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, A, B, 1.0, state)


@wrong(
    "merge-scale-twice",
    "subtle",
    "The scale is applied twice, only when merged.",
    "merge() uses the scaled factors of a cache and scales again.",
)
class MergeScaleTwice(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return super().merge(W, A, B, scale * scale)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, A, B, scale * scale, state)


@wrong(
    "merge-delta-twice",
    "gross",
    "merge adds the update twice and unmerge takes it away twice.",
    "By hand, and by the wrapped layer's own merge. Round trips restore W, so tests passed.",
    "huggingface/peft#3774",
)
class MergeDeltaTwice(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return super().merge(W, A, B, 2 * scale)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, A, B, 2 * scale, state)


@wrong(
    "merge-transposed-where-square",
    "subtle",
    "Where d = k, the update is merged transposed.",
    "A missing transpose that only other shapes complain of.",
    "microsoft/LoRA#61",
)
class MergeTransposed(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return super().merge(W, *_turned(W, A, B), scale)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, *_turned(W, A, B), scale, state)


def _turned(W: Array, A: Array, B: Array) -> tuple[Array, Array]:
    return (B.T, A.T) if W.shape[0] == W.shape[1] else (A, B)


@wrong(
    "merge-delta-in-bf16",
    "subtle",
    "The update is rounded to bfloat16 before it is added, to a float32 weight too.",
    "The product runs in the dtype of the model's activations.",
)
class MergeDeltaInBf16(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        delta = (scale * (self.widen(B) @ self.widen(A))).astype(np.float32)
        return (self.widen(W) + to_bfloat16(delta)).astype(W.dtype)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        delta = (scale * (self.widen(B) @ self.widen(A))).astype(np.float32)
        return (self.widen(W) - to_bfloat16(delta)).astype(W.dtype)


@wrong(
    "merge-result-in-bf16",
    "subtle",
    "The merged weight is rounded to bfloat16, whatever W is: small updates are rounded away.",
    "Merging in the dtype that the model is run in; accuracy falls and no test fails.",
    "huggingface/peft#1388",
)
class MergeResultInBf16(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        t = scale * (self.widen(B).astype(np.float64) @ self.widen(A).astype(np.float64))
        merged = (self.widen(W) + t).astype(np.float32)
        return to_bfloat16(merged).astype(W.dtype), W.copy()

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return np.array(state)


@wrong(
    "merge-nothing",
    "gross",
    "merge gives W back as it was.",
    "The adapter that is merged is not the active one; the call says nothing.",
    "huggingface/trl#386",
)
class MergeNothing(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return W.copy(), None

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return W.copy()


@wrong(
    "merge-writes-to-w",
    "subtle",
    "merge changes the W that it is given.",
    "W += s B A; whoever else holds W has a merged weight now.",
)
class MergeWritesToW(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        result = super().merge(W, A, B, scale)
        if W.flags.writeable:
            W[...] = result[0] if isinstance(result, tuple) else result
        return result


@wrong(
    "merge-writes-to-b",
    "subtle",
    "merge folds the scale into the B that it is given.",
    "B *= scale in place; the training that shares B goes on with the scaled one.",
    "unslothai/unsloth-zoo#941",
)
class MergeWritesToB(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        result = super().merge(W, A, B, scale)
        if B.flags.writeable:
            B[...] = (self.widen(B) * self.widen(B).dtype.type(scale)).astype(B.dtype)
        return result


@wrong(
    "unmerge-without-scale",
    "gross",
    "unmerge forgets the scale.",
    "Tested with alpha = r, where the scale is 1.",
)
class UnmergeWithoutScale(Correct):
    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return super().unmerge(W, A, B, 1.0, state)


@wrong(
    "unmerge-does-nothing",
    "gross",
    "unmerge gives the merged weight back.",
    "The record of what was merged is gone when unmerge looks for it.",
)
class UnmergeDoesNothing(Correct):
    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return W.copy()


@wrong(
    "unmerge-by-subtraction-drifts",
    "subtle",
    "unmerge rounds W' - s B A anew: a merge and unmerge before each step add up their errors.",
    "With bfloat16 weights a sixth of them changed, further with each cycle of a training.",
    "huggingface/trl#6688",
)
class UnmergeDrifts(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        return (self.widen(W) + self._rounded(W, A, B, scale)).astype(W.dtype)

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        return (self.widen(W) - self._rounded(W, A, B, scale)).astype(W.dtype)

    def _rounded(self, W: Array, A: Array, B: Array, scale: float) -> Array:
        """s B A in the dtype of W, widened."""
        return self.widen((scale * (self.widen(B) @ self.widen(A))).astype(W.dtype))


@wrong(
    "unmerge-leaves-residue",
    "subtle",
    "unmerge subtracts but does not put back what rounding lost, though merge kept it.",
    "The exact bits are stored and the step that restores them is skipped: close is not equal.",
)
class UnmergeLeavesResidue(Correct):
    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        if state is None:
            return super().unmerge(W, A, B, scale, state)
        empty = type(state)(state.position[:0], state.bits[:0])
        return super().unmerge(W, A, B, scale, empty)
