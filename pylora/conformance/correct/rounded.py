"""A correct implementation of each precision in NumPy: it rounds what the precision says, no more.

The bounds of bounds/moves.py are tested with it, and the mutants of mutants/precisions.py are
made from it. A weight that is stored in fewer bits is not merged into.

    pylora conformance pylora.conformance.correct.rounded:Int8
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pylora.conformance.bounds.moves import BLOCK, GROUP, INTEGERS, STEPS, steps
from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.extras import need
from pylora.numbers.precision import weights_of
from pylora.reference import Reference
from pylora.types import Array, Drop, LoRA

F = np.float32
Rint = Callable[[Array], Array]


def to_bf16(a: Array) -> Array:
    """The nearest bfloat16 of each element, ties to even, as float32."""
    wide: Array = a.astype(need("ml_dtypes").bfloat16).astype(F)
    return wide


def in_groups(a: Array, function: Callable[[Array], Array], size: int = GROUP) -> Array:
    """`function` of a's columns in groups [rows, groups, size], the last filled with zeros."""
    groups = -(-a.shape[1] // size)
    filled = np.zeros((a.shape[0], groups * size), F)
    filled[:, : a.shape[1]] = a
    done = function(filled.reshape(a.shape[0], groups, size))
    return done.reshape(filled.shape)[:, : a.shape[1]].astype(F)


def as_integers(x: Array, most: int = STEPS) -> Array:
    """Each element the nearest multiple of max|x| / most of its group."""

    def rounded(g: Array) -> Array:
        step = np.abs(g).max(axis=2, keepdims=True) / F(most)
        codes: Array = np.rint(g / np.where(step > 0, step, F(1)))
        return codes * step

    return in_groups(x, rounded)


def q8_0(W: Array, rint: Rint = np.rint) -> Array:
    """The values of ggml's Q8_0: 255 codes of a float16 step, max|W| / 127."""

    def kept(g: Array) -> Array:
        step = np.abs(g).max(axis=2, keepdims=True) / F(127)
        return rint(g / np.where(step > 0, step, F(1))) * half(step)

    return in_groups(W, kept)


def q4_1(W: Array, rint: Rint = np.rint) -> Array:
    """The values of ggml's Q4_1: 16 codes of a float16 step, from a float16 minimum on."""

    def kept(g: Array) -> Array:
        low = g.min(axis=2, keepdims=True)
        step = (g.max(axis=2, keepdims=True) - low) / F(15)
        return rint((g - low) / np.where(step > 0, step, F(1))) * half(step) + half(low)

    return in_groups(W, kept)


def q4_k(W: Array, rint: Rint = np.rint) -> Array:
    """Values of ggml's Q4_K, of blocks of 256: 16 codes of a step from a minimum on for each 32,
    both of them multiples, up to 63, of a float16 number of the block."""

    def kept(b: Array) -> Array:
        g = b.reshape(*b.shape[:2], BLOCK // GROUP, GROUP)
        low = np.maximum(-g.min(axis=3, keepdims=True), 0)
        step = (g.max(axis=3, keepdims=True) + low) / F(15)
        step, low = (multiple(a, rint) for a in (step, low))
        codes = np.clip(rint((g + low) / np.where(step > 0, step, F(1))), 0, 15)
        values: Array = np.where(step > 0, codes, 0) * step - low
        return values.reshape(b.shape)

    return in_groups(W, kept, BLOCK)


def multiple(a: Array, rint: Rint) -> Array:
    """The nearest of 64 multiples of a float16 number, for all groups of a block."""
    unit = half(a.max(axis=2, keepdims=True) / F(63))
    times: Array = np.clip(rint(a / np.where(unit > 0, unit, F(1))), 0, 63)
    return np.where(unit > 0, times, 0).astype(F) * unit


def half(a: Array) -> Array:
    """float16 and back. NotImplementedError beyond it: these formats do not hold such weights."""
    if (np.abs(a) > 65504).any():
        raise NotImplementedError("a scale of this weight is beyond float16")
    return a.astype(np.float16).astype(F)


class Rounds(Reference):
    """The reference on weights as they are given, with the rounding of a precision."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision

    def stored(self, W: Array) -> Array:
        """The values that the precision keeps of W."""
        by: dict[str, Callable[[Array], Array]] = {"bf16": to_bf16, "int8": q8_0, "int4": q4_1}
        by["blocks"] = q4_k
        return by.get(weights_of(self.precision), np.ascontiguousarray)(W)

    def low(self, a: Array) -> Array:
        """A factor of a product with the adapter, and in bf16 of any."""
        return to_bf16(a) if self.precision == "bf16" else a

    def of_x(self, x: Array) -> Array:
        """x as it is multiplied with W."""
        if self.precision in INTEGERS:
            return as_integers(x, steps(self.precision))
        return self.low(x)

    def product(self, x: Array, M: Array) -> Array:
        """x M, in three products of bfloat16 halves where the precision says so."""
        if self.precision != "fp32x3":
            return self._rows(x, M)
        x1, M1 = to_bf16(x), to_bf16(M)
        x2, M2 = to_bf16(x - x1), to_bf16(M - M1)
        return self._rows(x1, M1) + self._rows(x1, M2) + self._rows(x2, M1)

    def lora_forward(
        self,
        x: Array,
        W: Array,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        *rest: Any,
        **more: Any,
    ) -> tuple[Array, Array | None]:
        y, h = self.product(self.of_x(x), self.stored(W).T), None
        if bias is not None:
            y = y + bias
        if lora is not None:
            h = self._rows(self.low(self.dropout(x, drop)), self.low(lora.A).T)
            if bool((lora.B != 0).any()):
                y = y + F(lora.scale) * self._rows(h, lora.B.T)
        return y, h

    def lora_backward(
        self,
        dy: Array,
        x: Any,
        h: Any,
        W: Any,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        **more: Any,
    ) -> tuple[Array | None, Array | None, Array | None]:
        dx, dA, dB = self.product(self.low(dy), self.stored(W)), None, None
        if lora is not None:
            s = F(lora.scale)
            g = self._rows(self.low(dy), self.low(lora.B))
            dA = s * (g.T @ self.low(self.dropout(x, drop)))
            dB = s * (self.low(dy).T @ h)
            dx = dx + self.dropout(s * self._rows(g, lora.A), drop)
        return dx, dA, dB


class Rounded(Correct):
    """Every capability but merging. Subclass it with another `precision`, or other `rounds`."""

    dtypes = ("float32",)
    merge = unmerge = bias_merge = embedding_merge = None  # type: ignore[assignment]
    dora_norm = dora_forward = dora_backward = None  # type: ignore[assignment]
    dora_merge = dora_unmerge = None  # type: ignore[assignment]
    name = "pylora reference, rounded"
    precision = "bf16"
    rounds = Rounds

    def __init__(self) -> None:
        self.ops = self.kept = self.rounds(self.precision)

    def stored(self, W: Array) -> Array:
        return self.kept.stored(np.ascontiguousarray(W))

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        dy, x, W, A, B = (self.widen(a) for a in (dy, x, W, A, B))
        lora, drop = LoRA(A, B, scale, p), self.drop(p, seed)
        h = self.ops.lora_forward(x, W, None, lora, drop)[1]
        grads: Any = self.ops.lora_backward(dy, x, h, W, lora, drop)
        return tuple(grads)

    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return _Attached(self, W, bias)


class _Attached(CorrectModule):
    merge = unmerge = None  # type: ignore[assignment]


class Fp32x3(Rounded):
    name, precision = "pylora reference, fp32x3", "fp32x3"


class Bf16(Rounded):
    name, precision = "pylora reference, bf16", "bf16"


class Int8(Rounded):
    name, precision = "pylora reference, int8", "int8"


class Int4(Rounded):
    name, precision = "pylora reference, int4", "int4"


class Int8a8(Rounded):
    name, precision = "pylora reference, int8a8", "int8a8"


class Int4a8(Rounded):
    name, precision = "pylora reference, int4a8", "int4a8"


class Blocks(Rounded):
    name, precision = "pylora reference, blocks", "blocks"
