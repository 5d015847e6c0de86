"""Methods beyond a layer's own: limits, layouts, caches and NaN, where only the layer's were looked
at before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.attending import CorrectDecoder
from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import AttentionShape
from pylora.types import AdamW, Array, Attn


def _as_if_contiguous(a: Array) -> Array:
    """An array that is not contiguous, in another order of its elements."""
    if a.flags.c_contiguous:
        return a
    return np.ascontiguousarray(np.ascontiguousarray(a).reshape(-1)[::-1].reshape(a.shape))


@wrong(
    "experts-64",
    "subtle",
    "Of more than 64 experts the first 64 alone are chosen from.",
    "The kernel keeps the scores in two registers of 32 lanes.",
)
class Experts64(Correct):
    def experts(self, logits: Array, k: int, normalize: bool) -> Array:
        if logits.shape[1] <= 64 or k > 64:
            return super().experts(logits, k, normalize)
        out = np.zeros_like(logits)
        out[:, :64] = super().experts(logits[:, :64], k, normalize)
        return out


@wrong(
    "rope-head-of-128",
    "subtle",
    "Of a head of more than 128 numbers those beyond are not turned.",
    "One block of threads turns a head, and has 64 pairs.",
)
class RopeHead128(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        y = super().rope(x, position, head_dim, theta, layout, inverse)
        heads = np.array(y).reshape(len(x), x.shape[1] // head_dim, head_dim)
        heads[..., 128:] = x.reshape(heads.shape)[..., 128:]
        return heads.reshape(x.shape)


@wrong(
    "window-of-128",
    "subtle",
    "A window of more than 128 keys is one of 128.",
    "The ring that holds the keys was made for one model.",
)
class Window128(Correct):
    def _attn(self, shape: AttentionShape) -> Attn:
        return super()._attn(replace(shape, window=min(shape.window, 128)))


@wrong(
    "clip-64-arrays",
    "subtle",
    "The norm is of the first 64 arrays; the others are scaled by it all the same.",
    "A fused kernel takes a table of at most so many pointers.",
)
class Clip64(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        if len(grads) <= 64:
            return super().clip(grads, limit)
        norm = math.sqrt(sum(self.ops.sum_squares(self.widen(g)) for g in grads[:64]))
        factor = min(1.0, limit / norm) if norm > 0 else 1.0
        return [self.scaled(g, factor) for g in grads]


@wrong(
    "biases-of-16-adapters",
    "subtle",
    "In a mixed batch the adapters from the 17th on have no bias.",
    "The table of biases was made for the adapters of one request.",
)
class Biases16(Correct):
    def bias_mixed(
        self, x: Array, W: Array, adapters: Any, rows: Array, bias: Array | None = None
    ) -> Array:
        few = [a if i < 16 else (a[0], a[1], None, a[3]) for i, a in enumerate(adapters)]
        return super().bias_mixed(x, W, few, rows, bias)


@wrong(
    "decoder-last-256-keys",
    "subtle",
    "A single row that is decoded sees the last 256 keys of its sequence.",
    "The kernel for one row keeps its scores in shared memory.",
)
class DecodesShort(Correct):
    def decoder(self, weights: Any, shape: AttentionShape) -> CorrectDecoder:
        return _Short(self, weights, shape)


class _Short(CorrectDecoder):
    def attend(self, q: Array, k: Array, v: Array, n: int) -> Array:
        return super().attend(q, k[-256:], v[-256:], n) if n == 1 else super().attend(q, k, v, n)


@wrong(
    "cross-entropy-logits-contiguous",
    "subtle",
    "Logits that are a part of a wider array are read as if they were contiguous.",
    "A padded vocabulary is cut off by a view.",
)
class LogitsContiguous(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        return super().cross_entropy(_as_if_contiguous(logits), labels)


@wrong(
    "adamw-gradient-contiguous",
    "subtle",
    "A gradient that is the transpose of another array is read in the order of its memory.",
    "dA comes out of a product that gives it column by column.",
)
class GradientContiguous(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        return super().adamw(p, _as_if_contiguous(g), m, v, o)


@wrong(
    "block-norm-contiguous",
    "subtle",
    "The second norm's weight is read as if it were contiguous.",
    "Weights come from a file, where everything is.",
)
class NormContiguous(Correct):
    def block(
        self, x: Array, weights: Any, adapters: Any, shape: AttentionShape, eps: float
    ) -> Array:
        changed = {**weights, "norm2": _as_if_contiguous(weights["norm2"])}
        return super().block(x, changed, adapters, shape, eps)


@wrong(
    "clip-gives-the-gradients-back",
    "subtle",
    "Below the limit clipping gives the gradients themselves, and the caller's writes meet.",
    "There is nothing to do.",
)
class ClipAlias(Correct):
    def scaled(self, g: Array, factor: float) -> Array:
        return g if factor == 1 else super().scaled(g, factor)


@wrong(
    "soft-cap-gives-x-back",
    "subtle",
    "Without a cap and with the multiplier 1 the result is x itself.",
    "There is nothing to do here either.",
)
class CapAlias(Correct):
    def soft_cap(self, x: Array, multiplier: float, cap: float) -> Array:
        return x if multiplier == 1 and not cap else super().soft_cap(x, multiplier, cap)


@wrong(
    "rms-norm-buffer",
    "subtle",
    "RMSNorm's result is a buffer of the object, used again for the next one of that shape.",
    "Layers of a model have one shape, and one after another they need one buffer.",
)
class NormBuffer(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        y = super().rms_norm(x, w, eps)
        buffers = vars(self).setdefault("buffers", {})
        buffer: Array = buffers.setdefault((y.shape, str(y.dtype)), np.empty_like(y))
        buffer[...] = y
        return buffer


@wrong(
    "squared-relu-hides-nan",
    "subtle",
    "Squared ReLU of NaN is 0.",
    "fmax takes the one of two numbers that is a number.",
)
class ReluHides(Correct):
    def activation(self, kind: str, x: Array, up: Array | None) -> Array:
        if kind == "relu2":
            x = np.fmax(self.widen(x), 0).astype(x.dtype)
        return super().activation(kind, x, up)


@wrong(
    "clip-nan-gives-zeros",
    "subtle",
    "Where the norm is no finite number all gradients become zeros.",
    "A step that broke should be skipped; it is, and nobody hears of it.",
)
class ClipHides(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        if all(np.isfinite(g.astype(np.float64)).all() for g in grads):
            return super().clip(grads, limit)
        return [np.zeros_like(g) for g in grads]


@wrong(
    "adamw-skips-nan",
    "subtle",
    "Where the gradient is NaN the parameter and its moments stay as they were.",
    "A mask of what is finite, so that a run goes on.",
)
class StepSkips(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        bad, new = np.isnan(g), super().adamw(p, g, m, v, o)
        return tuple(np.where(bad, old, one) for old, one in zip((p, m, v), new))


@wrong(
    "loss-hides-nan",
    "subtle",
    "The loss of a row with NaN among its logits is 0.",
    "The mean over a batch should not be lost to one row.",
)
class LossHides(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        nll, grad = super().cross_entropy(logits, labels)
        return np.where(np.isnan(nll), nll.dtype.type(0), nll), grad


@wrong(
    "step-sums-batches-in-16-bits",
    "subtle",
    "The gradients of micro-batches are added up in the parameters' bfloat16.",
    "Frameworks add into .grad, which has the parameter's dtype.",
)
class NarrowSteps(Correct):
    def loss_gradients(
        self, batches: Any, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        if A.dtype.itemsize > 2 or len(batches) < 2:
            return super().loss_gradients(batches, W, A, B, scale)
        total = max(1, sum(int(counted.sum()) for _, _, counted in batches))
        dA, dB = np.zeros_like(A), np.zeros_like(B)
        for batch in batches:
            share = np.float32(int(batch[2].sum()) / total)
            gA, gB = super().loss_gradients([batch], W, A, B, scale)
            dA = (dA + (gA.astype(np.float32) * share).astype(A.dtype)).astype(A.dtype)
            dB = (dB + (gB.astype(np.float32) * share).astype(B.dtype)).astype(B.dtype)
        return dA, dB


@wrong(
    "merge-skips-small-updates",
    "subtle",
    "An update that is below 10⁻³⁰ everywhere is not merged.",
    "Is there anything to merge? was asked with a tolerance.",
)
class SkipsSmall(Correct):
    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        size = np.abs(scale * (B.astype(np.float64) @ A.astype(np.float64))).max(initial=0.0)
        if 0 < size < 1e-30:
            return super().merge(W, A, np.zeros_like(B), scale)
        return super().merge(W, A, B, scale)


@wrong(
    "adapter-step-shares-moments",
    "subtle",
    "A and B of one shape share a table of the corrections, kept from the first call.",
    "A cache by shape alone.",
)
class SharedRates(Correct):
    def adapter_step(
        self,
        params: Mapping[str, Array],
        grads: Mapping[str, Array],
        lr: float,
        weight_decay: float,
        lora_plus_ratio: float,
    ) -> dict[str, Array]:
        kept = vars(self).setdefault("ratios", {})
        ratio = kept.setdefault(params["A"].shape, lora_plus_ratio)
        return super().adapter_step(params, grads, lr, weight_decay, ratio)
