"""The kit on weights that are stored in fewer bits: its bounds hold for what each precision says it
rounds, are come near to, and are broken by what rounds more."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import run
from pylora.conformance.bounds_precision import PRECISIONS
from pylora.conformance.correct import Correct, CorrectModule
from pylora.conformance.protocol import problems_of
from pylora.conformance.report import text
from pylora.reference import Reference

GROUP = 32
LAWS = (
    "F1 F2 F3 F6 F7 F11 F8 F9 F10 G1 G2 G3 E2 Q1 B1 B2 B3 B6 B9 B10 B11 B13 O1 D1 D2 D3 D7 X1 X2 "
    "X3 X4 X5 X6 X7 X8 N3 N4 N7 P1 P4 P5 I4 A1 A2 A4"
).split()


def to_bf16(a):
    import ml_dtypes

    return a.astype(ml_dtypes.bfloat16).astype(np.float32)


def in_groups(a, function):
    """`function` of a's columns in groups of 32, the last filled up with zeros."""
    filled = np.zeros((a.shape[0], -(-a.shape[1] // GROUP) * GROUP), np.float32)
    filled[:, : a.shape[1]] = a
    groups = filled.reshape(a.shape[0], filled.shape[1] // GROUP, GROUP)
    return function(groups).reshape(filled.shape)[:, : a.shape[1]].astype(np.float32)


def as_integers(x, steps=32639):
    def rounded(g):
        scale = np.abs(g).max(axis=2, keepdims=True) / np.float32(steps)
        return np.rint(g / np.where(scale > 0, scale, 1)) * scale

    return in_groups(x, rounded)


def half(a):
    """float16 and back; what is beyond it is not stored in these formats."""
    if (np.abs(a) > 65504).any():
        raise NotImplementedError("a scale is beyond float16")
    return a.astype(np.float16).astype(np.float32)


def q8_0(W, rint=np.rint):
    def kept(g):
        step = np.abs(g).max(axis=2, keepdims=True) / np.float32(127)
        return rint(g / np.where(step > 0, step, 1)) * half(step)

    return in_groups(W, kept)


def q4_1(W, rint=np.rint):
    def kept(g):
        low = g.min(axis=2, keepdims=True)
        step = (g.max(axis=2, keepdims=True) - low) / np.float32(15)
        return rint((g - low) / np.where(step > 0, step, 1)) * half(step) + half(low)

    return in_groups(W, kept)


class Rounds(Reference):
    """The reference, with the rounding of a precision and no more."""

    def __init__(self, precision):
        super().__init__()
        self.precision = precision
        self.bf16 = precision == "bf16"

    def stored(self, W):
        by = {"bf16": to_bf16, "int8": q8_0, "int4": q4_1}
        return by.get(self.precision, np.ascontiguousarray)(W)

    def low(self, a):
        return to_bf16(a) if self.bf16 else a

    def product(self, x, W):
        """x W of the stored weight's values."""
        if self.precision == "fp32x3":
            x1, W1 = to_bf16(x), to_bf16(W)
            x2, W2 = to_bf16(x - x1), to_bf16(W - W1)
            return self._rows(x1, W1) + self._rows(x1, W2) + self._rows(x2, W1)
        return self._rows(x, W)

    def of_x(self, x):
        return as_integers(x) if self.precision in ("int8", "int4") else self.low(x)

    def lora_forward(self, x, W, bias=None, lora=None, drop=None, residual=None):
        y, h = self.product(self.of_x(x), self.stored(W).T), None
        if bias is not None:
            y = y + bias
        if lora is not None:
            h = self._rows(self.low(self.dropout(x, drop)), self.low(lora.A).T)
            if (lora.B != 0).any():
                y = y + np.float32(lora.scale) * self._rows(h, lora.B.T)
        return y, h

    def lora_backward(self, dy, x, h, W, lora=None, drop=None):
        s, dA, dB = np.float32(lora.scale if lora else 0), None, None
        dx = self.product(self.low(dy), self.stored(W))
        if lora is not None:
            g = self._rows(self.low(dy), self.low(lora.B))
            dA, dB = s * (g.T @ self.low(self.dropout(x, drop))), s * (self.low(dy).T @ h)
            dx = dx + self.dropout(s * self._rows(g, lora.A), drop)
        return dx, dA, dB


class Attached(CorrectModule):
    merge = unmerge = None  # a stored weight is not merged into


class InPrecision(Correct):
    """Every capability but merging, in one precision."""

    dtypes = ("float32",)
    merge = unmerge = None
    ops_class = Rounds

    def __init__(self, precision="bf16"):
        self.precision = precision
        self.ops = self.ops_class(precision)

    def stored(self, W):
        return self.ops.stored(np.ascontiguousarray(W))

    def dropout_backward(self, dy, x, W, A, B, scale, p, seed):
        from pylora.types import LoRA

        dy, x, W, A, B = map(self.widen, (dy, x, W, A, B))
        lora, drop = LoRA(A, B, scale, p), self.drop(p, seed)
        h = self.ops.lora_forward(x, W, None, lora, drop)[1]
        return self.ops.lora_backward(dy, x, h, W, lora, drop)

    def module(self, W, bias=None):
        return Attached(self, W, bias)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_what_a_precision_says_it_rounds_is_within_its_bounds(precision):
    report = run(InPrecision(precision), LAWS, examples=12)
    assert report.ok, text(report)
    assert report.warnings == []
    assert [o.law.id for o in report.of("not tested")] == []
    tight = {o.law.id: o.tightness for o in report.outcomes if o.tightness > 0}
    assert {law for law, t in tight.items() if t < 1e-3} == set()
    assert tight["F1"] > 0.1, "nothing comes near the bound, which would let mistakes through"


WRONG = {}


def wrong(precision, *laws):
    """Marks a way to round that is not the precision's; any of `laws` must find it."""

    def keep(cls):
        WRONG[cls.__name__] = cls, precision, laws
        return cls

    return keep


@wrong("bf16", "F1")
class CutsOff(Rounds):
    def low(self, a):
        return (np.ascontiguousarray(a).view(np.uint32) & 0xFFFF0000).view(np.float32)


@wrong("bf16", "F1", "F3")
class AddsUpInBfloat16(Rounds):
    def product(self, x, W):
        total = np.zeros((len(x), W.shape[1]), np.float32)
        for i in range(len(W)):
            total = to_bf16(total + x[:, i : i + 1] * W[i])
        return total


@wrong("bf16", "B1")
class BackThroughTheSource(Rounds):
    def lora_backward(self, dy, x, h, W, lora=None, drop=None):
        self.stored = lambda W: W
        try:
            return super().lora_backward(dy, x, h, W, lora, drop)
        finally:
            del self.stored


@wrong("int8", "F1")
class EightBitsOfX(Rounds):
    def of_x(self, x):
        return as_integers(x, 127)


@wrong("int8", "F1")
class OneScaleForTheRow(Rounds):
    def of_x(self, x):
        scale = np.abs(x).max(axis=1, keepdims=True, initial=0) / np.float32(32639)
        return (np.rint(x / np.where(scale > 0, scale, 1)) * scale).astype(np.float32)


@wrong("int8", "Q1")
class CutsCodesOff(Rounds):
    def stored(self, W):
        return q8_0(W, np.trunc)


@wrong("int4", "Q1")
class FloorsCodes(Rounds):
    def stored(self, W):
        return q4_1(W, np.floor)


@wrong("int4", "F1")
class ForgetsTheMinimum(Rounds):
    def product(self, x, W):
        return super().product(x, W - W.min(axis=0, keepdims=True))


@wrong("fp32x3", "F1")
class TwoProducts(Rounds):
    def product(self, x, W):
        W1 = to_bf16(W)
        return self._rows(to_bf16(x), W1) + self._rows(to_bf16(x), W - W1)


@pytest.mark.parametrize("name", list(WRONG))
def test_what_rounds_more_is_found(name):
    cls, precision, laws = WRONG[name]

    class Mistaken(InPrecision):
        ops_class = cls

    report = run(Mistaken(precision), laws, examples=100, shrink=False)
    assert report.of("FAILED"), text(report)


def test_a_precision_without_its_weights_is_reported():
    class Quantized(InPrecision):
        stored = None

    assert "stored" in problems_of(Quantized("int8"))[0]
    assert "int7" in problems_of(InPrecision("int7"))[0]
