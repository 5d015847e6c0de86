"""Limits of size: right for what is usual, and wrong beyond."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.conformance.mutants.registry import wrong


@wrong(
    "rank-beyond-64-cut",
    "subtle",
    "Ranks beyond 64 are left out of the forward pass.",
    "A buffer for h has 64 places, which every adapter that was tried fits into.",
)
class RankCut(Correct):
    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        return super().forward(x, W, A[:64], B[:, :64], scale, bias)


@wrong(
    "rows-beyond-4096-base",
    "subtle",
    "Rows from 4096 on get the base alone.",
    "The grid of the second kernel is cut off at what one launch may hold.",
)
class RowsCut(Correct):
    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        y = super().forward(x, W, A, B, scale, bias)
        y[4096:] = self.base(x[4096:], W, bias)
        return y


@wrong(
    "outputs-beyond-32768-wrap",
    "subtle",
    "Outputs from 32768 on are those from 0 on again.",
    "A column's number is kept in 16 bits.",
)
class OutputsWrap(Correct):
    def forward(self, x: Any, W: Any, A: Any, B: Any, scale: float, bias: Any = None) -> Any:
        y = super().forward(x, W, A, B, scale, bias)
        y[:, 32768:] = y[:, : y.shape[1] - 32768]
        return y


@wrong(
    "gradient-last-short-tile",
    "subtle",
    "With more than 128 rows, those after the last whole 32 are not summed into dA.",
    "A loop over tiles rounds down; short batches take another path.",
)
class GradientTile(Correct):
    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        n = len(x) // 32 * 32 if len(x) > 128 else len(x)
        return dx, super().backward(dy[:n], x[:n], W, A, B, scale)[1], dB


@wrong(
    "gradient-outputs-beyond-8192",
    "subtle",
    "dx leaves out outputs from 8192 on.",
    "The head of a language model is the only layer that is so wide.",
)
class GradientOutputs(Correct):
    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        _, dA, dB = super().backward(dy, x, W, A, B, scale)
        return super().backward(dy[:, :8192], x, W[:8192], A, B[:8192], scale)[0], dA, dB


@wrong(
    "gradient-rank-257",
    "subtle",
    "Of rank 257 or more, the last row of dA stays zero.",
    "A block has 256 threads, one for each row.",
)
class GradientRank(Correct):
    def backward(self, dy: Any, x: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        dx, dA, dB = super().backward(dy, x, W, A, B, scale)
        if len(A) > 256:
            dA[256:] = 0
        return dx, dA, dB


@wrong(
    "mixed-rank-beyond-32",
    "subtle",
    "In a mixed batch an adapter's ranks beyond 32 are left out.",
    "The kernel for many adapters was written for small ranks, and is used for all.",
)
class MixedRank(Correct):
    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        cut = [(A[:32], np.ascontiguousarray(B[:, :32]), s) for A, B, s in adapters]
        return super().forward_mixed(x, W, cut, rows, bias)


@wrong(
    "mixed-adapter-256",
    "subtle",
    "Adapter 256 of a mixed batch is adapter 0.",
    "Indices of adapters are stored in a byte.",
)
class MixedByte(Correct):
    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        rows = np.asarray(rows)
        wrapped = rows if len(adapters) <= 256 else np.where(rows < 0, rows, rows % 256)
        return super().forward_mixed(x, W, adapters, wrapped, bias)


@wrong(
    "mixed-segment-beyond-512",
    "subtle",
    "Rows of a run of one adapter from the 513th on get the base.",
    "A segment is handed to one block, which has 512 rows.",
)
class MixedSegment(Correct):
    def forward_mixed(self, x: Any, W: Any, adapters: Any, rows: Any, bias: Any = None) -> Any:
        rows = np.array(rows)
        length = np.arange(len(rows)) - np.maximum.accumulate(
            np.where(np.diff(rows, prepend=-9) != 0, np.arange(len(rows)), 0)
        )
        return super().forward_mixed(x, W, adapters, np.where(length >= 512, -1, rows), bias)


@wrong(
    "stacked-beyond-16-adapters",
    "subtle",
    "Of more than 16 adapters that are active at once the others are left out.",
    "A table of pointers on the stack has 16 places.",
)
class StackedSixteen(Correct):
    def forward_stacked(self, x: Any, W: Any, adapters: Any, bias: Any = None) -> Any:
        return super().forward_stacked(x, W, list(adapters)[:16], bias)


@wrong(
    "merge-beyond-65536-elements",
    "subtle",
    "Elements of a weight from 65536 on are not merged.",
    "The launch covers 65536 elements and the loop over launches is missing.",
)
class MergeElements(Correct):
    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        merged, state = super().merge(W, A, B, scale)
        merged.reshape(-1)[65536:] = np.ascontiguousarray(W).reshape(-1)[65536:]
        return merged, state


@wrong(
    "merge-rank-beyond-128",
    "subtle",
    "Ranks beyond 128 are not merged.",
    "A tile of B A holds 128 ranks, and the loop over tiles was for a later day.",
)
class MergeRank(Correct):
    def merge(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        return super().merge(W, A[:128], B[:, :128], scale)


@wrong(
    "unmerge-positions-of-16-bits",
    "subtle",
    "What unmerging puts back goes to its position modulo 65536.",
    "The residue's positions are kept in 16 bits.",
)
class UnmergePositions(Correct):
    def unmerge(self, W: Any, A: Any, B: Any, scale: float, state: Any = None) -> Any:
        if state is not None and hasattr(state, "position"):
            state = type(state)(state.position % 65536, state.bits)
        return super().unmerge(W, A, B, scale, state)


@wrong(
    "dropout-beyond-65536-kept",
    "subtle",
    "Elements of x from 65536 on are never dropped.",
    "The mask is drawn into a buffer of that size, the rest of which is ones.",
)
class DropoutCut(Correct):
    def dropout_forward(
        self, x: Any, W: Any, A: Any, B: Any, scale: float, p: float, seed: int
    ) -> Any:
        y = super().dropout_forward(x, W, A, B, scale, p, seed)
        rows = 65536 // max(1, x.shape[1])
        y[rows:] = self.forward(x[rows:], W, A, B, scale)
        return y


@wrong(
    "attention-group-beyond-8",
    "subtle",
    "Query heads from the ninth of a group on use the last key head.",
    "Groups of 1, 2, 4 and 8 are all that the models had.",
)
class AttentionGroup(Correct):
    def attention(self, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        y = super().attention(x, weights, adapters, shape)
        return y if shape.heads // shape.kv_heads <= 8 else np.zeros_like(y)


@wrong(
    "attention-positions-beyond-1024",
    "subtle",
    "A query sees the last 1024 keys only.",
    "Scores are kept in a buffer of 1024; longer texts were not tried.",
)
class AttentionWindow(Correct):
    def attention(self, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        window = getattr(shape, "window", 0)
        if max(shape.lengths) > 1024 and not window:
            shape = replace(shape, window=1024)
        return super().attention(x, weights, adapters, shape)


@wrong(
    "attention-gradient-odd-head",
    "subtle",
    "With a head that is larger than 64 and no power of two, dx is that of its first numbers.",
    "Sizes of heads are filled up to 64 or 128, and the filling is read.",
)
class AttentionOddHead(Correct):
    def attention_backward(self, dy: Any, x: Any, weights: Any, adapters: Any, shape: Any) -> Any:
        dx, grads = super().attention_backward(dy, x, weights, adapters, shape)
        odd = shape.head_dim > 64 and shape.head_dim & (shape.head_dim - 1)
        return (dx * dx.dtype.type(0.5) if odd else dx), grads


class _FewSlots(CorrectModule):
    attached = 0

    def attach(self, A: Any, B: Any, scale: float) -> None:
        self.attached += 1
        super().attach(A, B, scale if self.attached <= 64 else 1.0)


@wrong(
    "module-sixty-fifth-adapter",
    "subtle",
    "The 65th adapter that is attached has the scale 1.",
    "Scales are kept in a table of 64, whose end is not looked at.",
)
class ModuleSlots(Correct):
    def module(self, W: Any, bias: Any = None) -> Any:
        return _FewSlots(self, W, bias)


@wrong(
    "plan-layers-of-two-digits",
    "subtle",
    "Of layers with three digits the last one is not read.",
    "Models had fewer than a hundred layers.",
)
class PlanDigits(Correct):
    def plan(self, config: Any, modules: Any) -> Any:
        found = super().plan(config, modules)
        return {
            path: e
            for path, e in found.items()
            if not any(len(p) > 2 for p in path.split(".") if p.isdigit())
        }


@wrong(
    "load-beyond-128-modules",
    "subtle",
    "Only the first 128 modules of a file are loaded.",
    "The header of the file is read into a buffer of a fixed size.",
)
class LoadCut(Correct):
    def load(self, directory: str, modules: Any) -> Any:
        return dict(list(super().load(directory, modules).items())[:128])


@wrong(
    "init-beyond-65536-again",
    "subtle",
    "Elements of A from 65536 on repeat the first ones.",
    "The stream's counter has 16 bits.",
)
class InitAgain(Correct):
    def init(self, d: int, k: int, r: int, seed: int, method: str) -> Any:
        A, B = super().init(d, k, r, seed, method)
        flat = A.reshape(-1)
        flat[65536:] = flat[: max(0, flat.size - 65536)]
        return A, B


@wrong(
    "loss-beyond-1024-rows",
    "subtle",
    "Of a micro-batch of more than 1024 rows the others do not count.",
    "The reduction of the loss has one block.",
)
class LossRows(Correct):
    def loss_gradients(self, batches: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        cut = [(x[:1024], t[:1024], c[:1024]) for x, t, c in batches]
        return super().loss_gradients(cut, W, A, B, scale)
