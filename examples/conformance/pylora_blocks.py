"""pylora's C backend under the kit with a weight in the blocks of a GGUF file: the kit's precision
"blocks".

PYTHONPATH=examples/conformance pylora conformance pylora_blocks:Q4K

A file has such blocks from elsewhere; here numbers are made into them by the plainest rule, which
looks at a block alone. What is under test is what is done with the blocks, not how good they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pylora_backends import C, Padded, Padding, _Backend

from pylora import backends
from pylora.model.embedding import Embedding
from pylora.numbers.blocks import row_bytes
from pylora.numbers.precision import Stored
from pylora.types import LoRA

WIDE = 256  # inputs of the widest blocks


def half(a: Any) -> Any:
    """Bytes of float16 [n, 2], and their values as float32 [n, 1]."""
    narrow = np.ascontiguousarray(a.reshape(-1, 1), "<f2")
    return narrow.view(np.uint8), narrow.astype(np.float32)


def over(a: Any, b: Any) -> Any:
    """a / b, 0 where b is 0."""
    return np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0
    )


def whole(a: Any, most: int, least: int = 0) -> Any:
    return np.clip(np.rint(a), least, most).astype(np.int64)


def q5_0(W: Any) -> Any:
    """[n, 32] -> blocks: codes of 5 bits, 16 is zero."""
    d, value = half(np.abs(W).max(axis=1) / 15)
    q = whole(over(W, value), 31 - 16, -16) + 16
    high = np.packbits((q >> 4).astype(np.uint8), axis=1, bitorder="little")
    return np.hstack([d, high, (q[:, :16] & 15 | (q[:, 16:] & 15) << 4).astype(np.uint8)])


def q4_k(W: Any) -> Any:
    """[n, 256] -> blocks: codes of 4 bits from a minimum on; it and the step are multiples, up to
    63, of float16 numbers."""
    g = W.reshape(-1, 8, 32)
    low = np.maximum(-g.min(axis=2), 0)
    d, scale = half(np.maximum((g.max(axis=2) + low) / 15, 0).max(axis=1) / 63)
    dmin, least = half(low.max(axis=1) / 63)
    s, m = whole(over((g.max(axis=2) + low) / 15, scale), 63), whole(over(low, least), 63)
    step, start = (
        (scale * s).astype(np.float32)[..., None],
        (least * m).astype(np.float32)[..., None],
    )
    q = whole(over(g + start, step), 15).reshape(-1, 4, 2, 32)
    first, last = slice(0, 4), slice(4, 8)
    packed = [
        s[:, first] | s[:, last] >> 4 << 6,
        m[:, first] | m[:, last] >> 4 << 6,
        s[:, last] & 15 | (m[:, last] & 15) << 4,
    ]
    codes = (q[:, :, 0] | q[:, :, 1] << 4).reshape(len(q), 128)
    return np.hstack([d, dmin, *(p.astype(np.uint8) for p in packed), codes.astype(np.uint8)])


def q6_k(W: Any) -> Any:
    """[n, 256] -> blocks: codes of 6 bits, 32 is zero, with a scale of 8 bits for each 16."""
    g = W.reshape(-1, 16, 16)
    own = np.abs(g).max(axis=2) / 31
    d, scale = half(own.max(axis=1) / 127)
    s = whole(over(own, scale), 127)
    q = whole(over(g, (scale * s).astype(np.float32)[..., None]), 31, -32) + 32
    q = q.reshape(-1, 2, 4, 32)  # halves of a block, quarters of a half
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = sum((q[:, :, i] >> 4) << 2 * i for i in range(4))
    parts = low.reshape(-1, 128), high.reshape(-1, 64), s.astype(np.int8).view(np.uint8)
    return np.hstack([*(p.astype(np.uint8) for p in parts), d])


KINDS = {"q5_0": (32, q5_0), "q4_k": (256, q4_k), "q6_k": (256, q6_k)}


class Blocks(Padding):
    """The backend's operations on weights in blocks of one kind, filled up with zeros."""

    def __init__(self, ops: Any, kind: str) -> None:
        super().__init__(ops, "int4")
        self._group, self.kind = WIDE, kind

    def stored(self, W: Any) -> Stored:
        W = self._fill(W)
        numbers, make = KINDS[self.kind]
        rows = (
            make(np.ascontiguousarray(W).reshape(-1, numbers)) if W.size else np.zeros(0, np.uint8)
        )
        return Stored(self.kind, rows.reshape(len(W), row_bytes(self.kind, W.shape[1])), W.shape)

    def pack(self, W: Any) -> Padded:
        return Padded(self._ops.pack(self.stored(W), self._precision), W.shape[1])


class _InBlocks(C):
    precision, kind = "blocks", ""
    dtypes = ("float32",)  # of arrays: what is rounded to bfloat16 is no matter of blocks

    def __init__(self) -> None:
        _Backend.__init__(self, "c", "int4")
        self.precision = "blocks"
        self.ops = Blocks(backends.get("c"), self.kind)
        self.name = f"pylora, backend c, {self.kind}"

    def _embedding(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        self._pack(W)  # says what its scales cannot hold
        stored = self.ops.stored(self.widen(W))
        layer = Embedding("embed", stored, ops=self.ops._ops, precision="int4")
        B = np.pad(self.widen(B), ((0, stored.shape[1] - W.shape[1]), (0, 0)))
        layer.lora = LoRA(self.widen(A), B, scale)
        return layer


class Q50(_InBlocks):
    kind = "q5_0"


class Q4K(_InBlocks):
    kind = "q4_k"


class Q6K(_InBlocks):
    kind = "q6_k"
