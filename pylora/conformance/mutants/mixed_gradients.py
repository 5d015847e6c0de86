"""Gradients of mixed batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.conformance.correct.base import by_adapter
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.batches import segments
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array

Gradients = tuple[Array, list[tuple[Array, Array]]]


class _Parts(Correct):
    """Of runs of rows, one after the other: what segment by segment kernels do."""

    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        by_adapter(rows, len(adapters))
        dx = np.empty_like(x)
        grads = [(np.zeros_like(A), np.zeros_like(B)) for A, B, _ in adapters]
        for a, b in segments(rows):
            i = int(rows[a])
            mine = np.full(b - a, i)
            part, some = super().backward_mixed(dy[a:b], x[a:b], W, adapters, mine)
            dx[a:b] = part
            if i >= 0:
                grads[i] = self.put(grads[i], some[i], a, b)
        return dx, grads

    def put(
        self, before: tuple[Array, Array], now: tuple[Array, Array], a: int, b: int
    ) -> tuple[Array, Array]:
        raise NotImplementedError


@wrong(
    "mixed-gradient-last-segment",
    "subtle",
    "Of an adapter that has several segments only the last one's gradient counts.",
    "Each segment writes dA and dB; the flag that says to add to them is not set.",
)
class LastSegment(_Parts):
    def put(
        self, before: tuple[Array, Array], now: tuple[Array, Array], a: int, b: int
    ) -> tuple[Array, Array]:
        return now


@wrong(
    "mixed-gradient-mean-of-segments",
    "subtle",
    "The gradients of an adapter's segments are averaged as they come.",
    "A running mean over micro-batches, taken over to segments.",
)
class MeanOfSegments(_Parts):
    def put(
        self, before: tuple[Array, Array], now: tuple[Array, Array], a: int, b: int
    ) -> tuple[Array, Array]:
        if not any((g != 0).any() for g in before):
            return now
        return tuple((p + n) / p.dtype.type(2) for p, n in zip(before, now))


@wrong(
    "mixed-gradient-row-of-the-next",
    "subtle",
    "A segment's gradient takes in the first row of the next segment.",
    "The end of a segment is inclusive in one place and exclusive in the other.",
)
class RowOfTheNext(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        dx, grads = super().backward_mixed(dy, x, W, adapters, rows)
        for a, b in segments(rows):
            i = int(rows[a])
            if i >= 0 and b < len(rows):
                more = self.backward(dy[b : b + 1], x[b : b + 1], W, *adapters[i])[1:3]
                grads[i] = grads[i][0] + more[0], grads[i][1] + more[1]
        return dx, grads


@wrong(
    "mixed-gradient-of-nobody",
    "subtle",
    "An adapter that no row uses gets the gradient of the one before it, not zeros.",
    "Gradients are allocated and not cleared; the buffer held another adapter's.",
)
class OfNobody(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        dx, grads = super().backward_mixed(dy, x, W, adapters, rows)
        for i in set(range(1, len(adapters))) - {int(i) for i in rows}:
            buffers = [np.ravel(g) for g in grads[i - 1]]
            grads[i] = tuple(np.resize(b, g.shape) for b, g in zip(buffers, grads[i]))  # type: ignore
        return dx, grads


@wrong(
    "mixed-gradient-masked-products",
    "subtle",
    "Every adapter's gradient is a product over all rows, those of others multiplied by zero.",
    "0 · NaN is NaN: one bad request spoils the gradients of all tenants.",
)
class MaskedProducts(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        dx, _ = super().backward_mixed(dy, x, W, adapters, rows)
        grads = []
        for i, lora in enumerate(adapters):
            mine = (np.asarray(rows) == i)[:, None].astype(dy.dtype)
            _, dA, dB = self.backward(dy * mine, x, W, *lora)[:3]
            grads.append((dA, dB))
        return dx, grads


@wrong(
    "mixed-gradient-first-scale",
    "gross",
    "All adapters' gradients use the first one's scale.",
    "The scale is an argument of the launch, not of the segment.",
)
class FirstScale(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        adapters = [(A, B, adapters[0][2]) for A, B, _ in adapters]
        return super().backward_mixed(dy, x, W, adapters, rows)


@wrong(
    "mixed-gradient-dx-base",
    "gross",
    "dx is dy W for every row: what comes through the adapters is missing.",
    "Adapters of other tenants are not differentiated through.",
)
class DxOfTheBase(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        _, grads = super().backward_mixed(dy, x, W, adapters, rows)
        none = np.full(len(x), -1)
        return super().backward_mixed(dy, x, W, adapters, none)[0], grads


@wrong(
    "mixed-gradient-rows-not-put-back",
    "subtle",
    "dx comes in the order of adapters, not of rows.",
    "Rows are sorted by adapter for the products, and the order is kept.",
)
class NotPutBack(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        dx, grads = super().backward_mixed(dy, x, W, adapters, rows)
        return dx[np.argsort(rows, kind="stable")], grads


@wrong(
    "mixed-gradient-rank-cut-at-64",
    "subtle",
    "Ranks beyond 64 get no gradient.",
    "The tile of the rank is a constant of the kernel; usual ranks are smaller.",
)
class RankCut(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        dx, grads = super().backward_mixed(dy, x, W, adapters, rows)
        for dA, dB in grads:
            dA[64:], dB[:, 64:] = 0, 0
        return dx, grads


@wrong(
    "mixed-gradient-256-adapters",
    "subtle",
    "The adapter's number is kept in 8 bits.",
    "A byte for each row was enough for all tests.",
)
class EightBits(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        by_adapter(rows, len(adapters))
        cut = np.where(np.asarray(rows) < 0, rows, np.asarray(rows) % 256)
        return super().backward_mixed(dy, x, W, adapters, cut)


@wrong(
    "mixed-gradient-negative-counts-from-the-end",
    "subtle",
    "An index below -1 is the base.",
    "`if index < 0`: a wrong index goes unnoticed.",
)
class NegativeIsBase(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        return super().backward_mixed(dy, x, W, adapters, np.maximum(rows, -1))


@wrong(
    "mixed-gradient-bfloat16-sums",
    "subtle",
    "Gradients of bfloat16 segments are rounded after every row.",
    "The accumulator has the dtype of the gradient.",
)
class NarrowSums(Correct):
    def backward_mixed(
        self, dy: Array, x: Array, W: Array, adapters: Sequence[LoraTriple], rows: Array
    ) -> Gradients:
        if x.dtype.itemsize != 2:
            return super().backward_mixed(dy, x, W, adapters, rows)
        by_adapter(rows, len(adapters))
        dx = np.empty_like(x)
        grads = [(np.zeros_like(A), np.zeros_like(B)) for A, B, _ in adapters]
        for j, i in enumerate(int(i) for i in rows):
            at = slice(j, j + 1)
            dx[at], some = super().backward_mixed(dy[at], x[at], W, adapters, np.array([i]))
            if i >= 0:
                grads[i] = grads[i][0] + some[i][0], grads[i][1] + some[i][1]
        return dx, grads
