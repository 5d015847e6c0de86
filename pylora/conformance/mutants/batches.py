"""Several adapters: stacked on every row, or one for each row of a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array


def segments(rows: Array) -> list[tuple[int, int]]:
    """(start, end) of each run of equal values."""
    rows = np.asarray(rows)
    cuts = np.flatnonzero(rows[1:] != rows[:-1]) + 1
    edges = [0, *cuts.tolist(), len(rows)]
    return [(a, b) for a, b in zip(edges, edges[1:]) if a < b]


@wrong(
    "stacked-first-scale",
    "gross",
    "All stacked adapters use the first one's scale.",
    "alpha and rank are fields of the layer, not of the adapter.",
    "sgl-project/sglang#16667",
)
class StackedFirstScale(Correct):
    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        adapters = [(A, B, adapters[0][2]) for A, B, _ in adapters]
        return super().forward_stacked(x, W, adapters, bias)


@wrong(
    "stacked-last-only",
    "gross",
    "Of stacked adapters only the last one counts.",
    "Each assignment of the update replaces the one before.",
)
class StackedLastOnly(Correct):
    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        return super().forward_stacked(x, W, adapters[-1:], bias)


@wrong(
    "stacked-factors-summed",
    "gross",
    "A's and B's are summed where their ranks agree: (B₁ + B₂)(A₁ + A₂), with cross terms.",
    "Averaging the files of two adapters, tensor by tensor.",
    "huggingface/peft#1155",
)
class StackedFactorsSummed(Correct):
    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        if len({A.shape[0] for A, _, _ in adapters}) == 1:
            wide = [(self.widen(A), self.widen(B), s) for A, B, s in adapters]
            A = np.sum([A for A, _, _ in wide], axis=0)
            B = np.sum([B * B.dtype.type(s) for _, B, s in wide], axis=0)
            adapters = [(A.astype(wide[0][0].dtype), B.astype(wide[0][1].dtype), 1.0)]
        return super().forward_stacked(x, W, adapters, bias)


@wrong(
    "stacked-bias-each-time",
    "subtle",
    "The base's bias is added once for each stacked adapter.",
    "A sum of whole outputs from which only the base's product is taken off.",
)
class StackedBiases(Correct):
    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        y = super().forward_stacked(x, W, adapters, bias)
        for _ in adapters[1:]:
            y = y if bias is None else (self.widen(y) + self.widen(bias)).astype(y.dtype)
        return y


@wrong(
    "mixed-minus-one-is-last",
    "subtle",
    "A row with index -1 gets the last adapter.",
    "adapters[-1] is an element in Python: base requests were answered with an adapter.",
    "vllm-project/vllm#48421",
)
class MinusOneIsLast(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        n = len(adapters)
        return super().forward_mixed(x, W, adapters, np.asarray(rows) % n if n else rows, bias)


@wrong(
    "mixed-zero-is-none",
    "subtle",
    "Adapter 0 is taken for none.",
    "`if index:`; the first adapter of a server never has an effect.",
)
class ZeroIsNone(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.where(np.asarray(rows) == 0, -1, rows)
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "mixed-segment-off-by-one",
    "subtle",
    "The last row of each run of rows of one adapter gets the base alone.",
    "An end that is inclusive on one side of a call and exclusive on the other.",
)
class SegmentOffByOne(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.array(rows)
        for _, end in segments(rows):
            rows[end - 1] = -1
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "mixed-leaks-into-next-row",
    "subtle",
    "The row after a run of one adapter's rows gets that adapter too, in place of its own.",
    "The tile of the last block reaches over the segment's end.",
)
class LeaksIntoNextRow(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.array(rows)
        for _, end in reversed(segments(rows)):
            if end < len(rows) and rows[end - 1] >= 0:
                rows[end] = rows[end - 1]
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "mixed-base-row-affected",
    "subtle",
    "Base rows in a batch with adapters get the adapter of the row before.",
    "The index of a row without adapter is not written, and the old one is still there.",
    "vllm-project/vllm#42008",
)
class BaseRowAffected(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.array(rows)
        for i in range(1, len(rows)):
            rows[i] = rows[i - 1] if rows[i] < 0 else rows[i]
        return super().forward_mixed(x, W, adapters, rows, bias)


@wrong(
    "mixed-not-unsorted",
    "gross",
    "Rows are sorted by adapter and the result is left in that order.",
    "Right as long as requests come sorted, as in the test.",
)
class NotUnsorted(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        order = np.argsort(np.asarray(rows), kind="stable")
        return super().forward_mixed(x, W, adapters, rows, bias)[order]


@wrong(
    "mixed-segments-in-another-order",
    "subtle",
    "Rows are sorted by adapter, and their segments counted in the order in which adapters appear.",
    "Two orders of the same list agree while the first row has the lowest adapter, and so on.",
    "vllm-project/vllm#15979",
)
class SegmentsInAnotherOrder(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.asarray(rows)
        by_adapter, start, taken = np.argsort(rows, kind="stable"), 0, rows.copy()
        for adapter in dict.fromkeys(rows.tolist()):
            end = start + int((rows == adapter).sum())
            taken[by_adapter[start:end]] = adapter
            start = end
        return super().forward_mixed(x, W, adapters, taken, bias)


@wrong(
    "mixed-ranks-padded-with-garbage",
    "subtle",
    "Adapters are padded to the largest rank with what was in the buffer before.",
    "The buffer of a slot is not cleared where a smaller adapter takes it over.",
)
class PaddedWithGarbage(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        top = max((A.shape[0] for A, _, _ in adapters), default=0)
        largest = next(((A, B) for A, B, _ in adapters if A.shape[0] == top), None)
        padded = []
        for A, B, scale in adapters:
            if largest is not None:
                r = A.shape[0]
                A = np.concatenate([A, largest[0][r:]], axis=0)
                B = np.concatenate([B, largest[1][:, r:]], axis=1)
            padded.append((A, B, scale))
        return super().forward_mixed(x, W, padded, rows, bias)


@wrong(
    "mixed-first-rank",
    "subtle",
    "Every adapter is cut to the first one's rank.",
    "One rank for the launch of the whole batch.",
)
class FirstRank(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        r = adapters[0][0].shape[0] if adapters else 0
        cut = [(A[:r], B[:, :r], scale) for A, B, scale in adapters]
        return super().forward_mixed(x, W, cut, rows, bias)


@wrong(
    "mixed-first-scale",
    "gross",
    "Every row uses the first adapter's scale.",
    "The scale is an argument of the kernel, A and B are tables.",
)
class MixedFirstScale(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        same = [(A, B, adapters[0][2]) for A, B, _ in adapters]
        return super().forward_mixed(x, W, same, rows, bias)


@wrong(
    "mixed-masked-by-zero",
    "subtle",
    "Every row runs through every adapter, times 0 or 1: one adapter's infinity is all rows' NaN.",
    "Masking by multiplication makes a batch as healthy as its worst adapter.",
)
class MaskedByZero(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.asarray(rows)
        y = self.widen(super().forward_mixed(x, W, adapters, rows, bias))
        with np.errstate(all="ignore"):
            for i, (A, B, scale) in enumerate(adapters):
                others = (rows != i)[:, None]
                update = self.widen(self.forward(x, W * 0, A, B, scale)) * y.dtype.type(0)
                y = np.where(others & np.isnan(update), update, y)
        return y.astype(x.dtype)


@wrong(
    "mixed-unknown-is-base",
    "subtle",
    "An index that names no adapter gets the base alone, in silence.",
    "A mistyped adapter name: an answer comes, from the wrong model.",
    "huggingface/peft#2090",
)
class UnknownIsBase(Correct):
    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        rows = np.where(np.asarray(rows) < len(adapters), rows, -1)
        return super().forward_mixed(x, W, adapters, rows, bias)
