"""Merging into a weight as a file stores it, and the exact way back: a part of the reference.

    W' = round(W + s B A), with a magnitude round(f (W + s B A)), f = m / n

in float64, each operation rounded once, in an order that is the same on every machine; then once to
the weight's dtype. Some rows at a time, so that float64 copies stay small.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.errors import BackendError, RangeError
from pylora.numbers.lengths import row_squares
from pylora.ops.dora import factor
from pylora.types import Array, LoRA, Residue

_ELEMENTS = 1 << 18  # of a weight that are float64 at a time


class Merge:
    """`merge` and `unmerge` over the array namespace `xp`, for weights in its memory."""

    xp: Any = np

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]:
        """W' = round(W + s B A), rounded once. Also the residue that makes unmerge exact.

        `dtype` is "f32", "f16" or "bf16"; a bf16 array is given as its uint16 bits. With a
        magnitude it is round(f (W + s B A)); n is `lora.norm`, or that of this W where it is None,
        and goes with the residue.
        """
        lora = self._measured(W, lora, dtype)
        merged, positions, lost = self.xp.empty_like(W), [], []
        for i, end, own in self._parts(W, lora):
            x = self._moved(self._wide(W[i:end], dtype), self._delta(own))
            merged[i:end] = self._narrow(x if own.magnitude is None else x * _column(own), dtype)
            back = self._narrow(self._away(self._wide(merged[i:end], dtype), own), dtype)
            bits = self._bits(W[i:end])
            position = self.xp.flatnonzero(self._bits(back) != bits)
            positions.append(position.astype(np.int64) + i * W.shape[1])
            lost.append(bits.reshape(-1)[position].astype(np.uint32))
        none = [self.xp.empty(0, np.int64)], [self.xp.empty(0, np.uint32)]
        position, bits = map(self.xp.concatenate, (positions or none[0], lost or none[1]))
        return merged, Residue(position, bits, lora.norm)

    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array:
        """The W that merge was given, bit for bit (same adapter, same residue)."""
        if lora.magnitude is not None and residue.norm is None:
            raise BackendError("unmerge: the residue of an adapter with a magnitude has a norm")
        lora = replace(lora, norm=residue.norm)
        W = self.xp.empty_like(merged)
        for i, end, own in self._parts(merged, lora):
            W[i:end] = self._narrow(self._away(self._wide(merged[i:end], dtype), own), dtype)
        flat = self._bits(W).reshape(-1)
        index = residue.position
        if bool(((index < 0) | (index >= flat.size)).any()):
            raise RangeError(f"a residue position is outside of 0 .. {flat.size - 1}")
        flat[index] = residue.bits.astype(flat.dtype)
        return flat.view(W.dtype).reshape(W.shape)

    def _measured(self, W: Array, lora: LoRA, dtype: str) -> LoRA:
        if lora.magnitude is None or lora.norm is not None:
            return lora
        n2, step = np.empty(W.shape[0]), max(1, _ELEMENTS // max(1, W.shape[1]))
        for i in range(0, W.shape[0], step):
            rows, s = self._wide(W[i : i + step], dtype), float(np.float32(lora.scale))
            n2[i : i + step] = row_squares(rows, lora.A, lora.B[i : i + step], s)
        return replace(lora, norm=np.sqrt(n2).astype(lora.magnitude.dtype))

    def _parts(self, W: Array, lora: LoRA) -> Any:
        """(first row, end, the adapter of these rows) of a few rows at a time."""
        step = max(1, _ELEMENTS // max(1, W.shape[1]))
        for i in range(0, W.shape[0], step):
            rows = slice(i, i + step)
            m, n = lora.magnitude, lora.norm
            own = LoRA(lora.A, lora.B[rows], lora.scale)
            if m is not None and n is not None:
                own = replace(own, magnitude=m[rows], norm=n[rows])
            yield i, min(i + step, W.shape[0]), own

    def _delta(self, lora: LoRA) -> Array:
        """s B A in float64, summed over the rank in order: the same bits on every machine."""
        A, B = lora.A.astype(np.float64), lora.B.astype(np.float64)
        t = self.xp.zeros((B.shape[0], A.shape[1]))
        for i in range(lora.rank):
            t = t + B[:, i : i + 1] * A[i : i + 1, :]
        return float(np.float32(lora.scale)) * t

    def _away(self, x: Array, lora: LoRA) -> Array:
        """x / f - s B A."""
        if lora.magnitude is not None:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                x = x / _column(lora)
        return self._moved(x, -self._delta(lora))

    def _moved(self, x: Array, t: Array) -> Array:
        """x + t, but a NaN stays itself: which of two NaN a sum has differs between machines."""
        return self.xp.where(x != x, x, x + t)

    def _wide(self, W: Array, dtype: str) -> Array:
        if dtype == "bf16":
            W = (W.astype(np.uint32) << 16).view(np.float32)
        return W.astype(np.float64)

    def _narrow(self, t: Array, dtype: str) -> Array:
        xp = self.xp
        with np.errstate(over="ignore"):
            if dtype == "f16":
                return t.astype(np.float16)
            f = t.astype(np.float32)
        if dtype == "f32":
            return f
        # float64 -> bfloat16, to nearest even, in one rounding: where float32 landed on a tie of
        # bfloat16 that the float64 value was not on, the float64 value decides.
        u = xp.ascontiguousarray(f).view(np.uint32)
        tie, exact = (u & 0xFFFF) == 0x8000, f.astype(np.float64)
        up = xp.where(tie & (abs(t) != abs(exact)), abs(t) > abs(exact), (u >> 16) & 1 == 1)
        rounded = (u >> 16) + ((u & 0xFFFF) > 0x8000) + (tie & up)
        return xp.where(xp.isnan(f), (u >> 16) | 0x40, rounded).astype(np.uint16)

    def _bits(self, a: Array) -> Array:
        """The array's bits as unsigned integers of its width (a contiguous copy if needed)."""
        unsigned = {2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
        return self.xp.ascontiguousarray(a).view(unsigned)


def _column(lora: LoRA) -> Array:
    """f as a column in float64: of float32 numbers m and n, rounded to float32 once."""
    return factor(lora, np).astype(np.float64)[:, None]


HOST = Merge()
