"""Arithmetic: too narrow, in another order, or dependent on what else is in the batch."""

from __future__ import annotations

import time

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import Array, LoRA


def to_bfloat16(a: Array) -> Array:
    """float32 values rounded to bfloat16's 8 bits, half away from zero, NaN as they are."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return np.where(np.isfinite(a), (bits + 0x8000 & 0xFFFF0000).view(np.float32), a)


def mantissa(a: Array, bits: int) -> Array:
    """float32 values with so many bits of mantissa left."""
    drop = 23 - bits
    u = np.ascontiguousarray(a, np.float32).view(np.uint32) + np.uint32(1 << (drop - 1))
    cut = (u >> drop << drop).view(np.float32)
    return np.where(np.isfinite(a), cut, a)


@wrong(
    "bf16-accumulation",
    "subtle",
    "Sums over k are kept in bfloat16.",
    "The accumulator has the dtype of the inputs; short sums look right.",
)
class Bf16Accumulation(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype.kind == "c":
            return super().forward(x, W, A, B, scale, bias)
        wide = [self.widen(a).astype(np.float32) for a in (x, W, A, B)]
        with np.errstate(all="ignore"):
            y = self._product(wide[0], wide[1])
            if wide[3].any():
                update = self._product(self._product(wide[0], wide[2]), wide[3])
                y = to_bfloat16(y + np.float32(scale) * update)
            y = y if bias is None else y + self.widen(bias)
            return y.astype(x.dtype)

    def _product(self, x: Array, M: Array) -> Array:
        y = np.zeros((x.shape[0], M.shape[0]), np.float32)
        for i in range(x.shape[1]):
            y = to_bfloat16(y + x[:, i : i + 1] * M[:, i])
        return y


@wrong(
    "tf32-products",
    "subtle",
    "Products of float32 matrices keep 10 bits of mantissa of each factor.",
    "Tensor cores do this (TF32) unless one forbids it, and the dtype still says float32.",
)
class Tf32(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype == np.float32:
            x, W, A, B = (mantissa(a, 10) for a in (x, W, A, B))
        return super().forward(x, W, A, B, scale, bias)


@wrong(
    "h-in-float16",
    "subtle",
    "h = x Aᵀ is stored in float16: it overflows beyond 65504, and small values vanish.",
    "The intermediate of a two-kernel product has the dtype of its buffer.",
    "vllm-project/vllm#2893",
)
class HInFloat16(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        wx, wA, wB = (self.widen(a) for a in (x, A, B))
        y = self.widen(self.base(x, W, bias))
        if x.dtype.kind == "c" or not (wB != 0).any():
            return super().forward(x, W, A, B, scale, bias)
        with np.errstate(all="ignore"):
            h = self.ops._rows(wx, wA.T).astype(np.float16).astype(wx.dtype)
            return (y + wx.dtype.type(scale) * self.ops._rows(h, wB.T)).astype(x.dtype)


@wrong(
    "float64-through-float32",
    "subtle",
    "float64 inputs are computed in float32 and returned as float64.",
    "A kernel for float32 behind an interface that converts in silence.",
)
class Float64ThroughFloat32(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype != np.float64:
            return super().forward(x, W, A, B, scale, bias)
        with np.errstate(all="ignore"):
            x, W, A, B = (a.astype(np.float32) for a in (x, W, A, B))
            bias = None if bias is None else bias.astype(np.float32)
            return super().forward(x, W, A, B, scale, bias).astype(np.float64)


@wrong(
    "batch-normalised",
    "subtle",
    "Rows are divided by the largest magnitude of the whole batch, and multiplied back.",
    "Dynamic scaling per tensor instead of per row: a row's bits depend on its neighbours.",
)
class BatchNormalised(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        wide, b = self.widen(x), self.widen(bias)
        top = np.abs(wide).max(initial=0)
        if not (np.isfinite(top) and 1e-3 < top < 1e3):
            return super().forward(x, W, A, B, scale, bias)
        W, A, B = (self.widen(a) for a in (W, A, B))
        y = super().forward((wide / top).astype(wide.dtype), W, A, B, scale) * top
        return (y if b is None else y + b).astype(x.dtype)


@wrong(
    "order-by-batch-size",
    "subtle",
    "The order of summation along k depends on the number of rows.",
    "A BLAS picks a kernel by the shape: a request's bits change with the requests beside it.",
    "pegainfer-project/pegainfer#414",
)
class OrderByBatchSize(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.shape[0] > 1:
            x, W, A = (np.ascontiguousarray(a[:, ::-1]) for a in (x, W, A))
        return super().forward(x, W, A, B, scale, bias)

    def base(self, x: Array, W: Array, bias: Array | None = None) -> Array:
        if x.shape[0] > 1:
            x, W = (np.ascontiguousarray(a[:, ::-1]) for a in (x, W))
        return super().base(x, W, bias)


@wrong(
    "rows-gathered-by-product",
    "subtle",
    "Rows are gathered by a product with a matrix of zeros and ones: 0 · NaN spreads.",
    "Masking by multiplication; attention over masked positions had the same fault.",
    "pytorch/pytorch#101967",
)
class GatheredByProduct(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        wide = self.widen(x)
        with np.errstate(invalid="ignore"):
            gathered = np.eye(x.shape[0], dtype=wide.dtype) @ wide
        return super().forward(gathered.astype(x.dtype), W, A, B, scale, bias)


@wrong(
    "zero-b-not-left-out",
    "subtle",
    "With B = 0 the update is still added: infinity · 0 is NaN, and -0.0 becomes 0.0.",
    "Zero times anything is taken to be zero. Fresh adapters are then not quite the base.",
)
class ZeroBNotLeftOut(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if self.widen(B).any():
            return super().forward(x, W, A, B, scale, bias)
        ops, wide = self.ops, [self.widen(a) for a in (x, A, B)]
        with np.errstate(all="ignore"):
            h = ops._rows(wide[0], wide[1].T)
            update = wide[0].dtype.type(scale) * ops._rows(h, wide[2].T)
            return (self.widen(self.base(x, W, bias)) + update).astype(x.dtype)


@wrong(
    "nan-hidden",
    "subtle",
    "NaN in the result becomes 0.",
    "nan_to_num keeps a demo alive; the training that made the NaN goes on unseen.",
)
class NanHidden(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        return np.where(np.isnan(y), y.dtype.type(0), y)


@wrong(
    "threads-split-the-sum",
    "subtle",
    "With n threads the sum along k is cut into n parts.",
    "The obvious way to use threads when m = 1; bits then depend on the machine.",
)
class ThreadsSplitTheSum(Correct):
    threads = 1

    def set_num_threads(self, n: int) -> None:
        self.threads = n

    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        first, *others = self._cuts(x)
        y = self.widen(super().forward(x[:, first], W[:, first], A[:, first], B, scale, bias))
        for cut in others:
            part = super().forward(x[:, cut], W[:, cut], A[:, cut], B, scale)
            y = y + self.widen(part)
        return y.astype(x.dtype)

    def base(self, x: Array, W: Array, bias: Array | None = None) -> Array:
        first, *others = self._cuts(x)
        y = self.widen(super().base(x[:, first], W[:, first], bias))
        for cut in others:
            y = y + self.widen(super().base(x[:, cut], W[:, cut]))
        return y.astype(x.dtype)

    def _cuts(self, x: Array) -> list[Array]:
        return [c for c in np.array_split(np.arange(x.shape[1]), self.threads) if c.size]


@wrong(
    "threads-drop-the-rest",
    "gross",
    "With n threads, rows beyond the last multiple of n are left zero.",
    "m // n rows for each thread, and nobody for the rest.",
)
class ThreadsDropTheRest(Correct):
    threads = 1

    def set_num_threads(self, n: int) -> None:
        self.threads = n

    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        y = super().forward(x, W, A, B, scale, bias)
        y[x.shape[0] // self.threads * self.threads :] = 0
        return y


@wrong(
    "shared-scratch-race",
    "subtle",
    "The adapter of a call lies in the object: two threads that call it use each other's.",
    "State that belongs to a call is kept in the layer. The active adapter is the usual case.",
    "huggingface/peft#804",
)
class SharedScratch(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        self.lora = LoRA(self.widen(A), self.widen(B), scale)
        wide = [self.widen(a) for a in (x, W, bias)]
        time.sleep(0)  # where a kernel call lets other threads run
        y, _ = self.ops.lora_forward(wide[0], wide[1], wide[2], self.lora)
        return y.astype(x.dtype)
