"""Single operations: norm, gate, rotation, loss, optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.types import AdamW, Array


@wrong("norm-eps-outside", "subtle", "eps is added to the root.", "1 / (sqrt(mean) + eps).")
class EpsOutside(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        wide = self.widen(x)
        root = np.sqrt((wide * wide).mean(axis=1, keepdims=True))
        return (wide / (root + wide.dtype.type(eps)) * self.widen(w)).astype(x.dtype)


@wrong("norm-sum-for-mean", "gross", "The squares are added up, not averaged.", "L2 norm.")
class SumForMean(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        wide = self.widen(x)
        total = (wide * wide).sum(axis=1, keepdims=True) + wide.dtype.type(eps)
        return (wide / np.sqrt(total) * self.widen(w)).astype(x.dtype)


@wrong("norm-one-plus-w", "gross", "The factor is 1 + w.", "Gemma's norm, in another model.")
class OnePlusW(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        return super().rms_norm(x, (w + w.dtype.type(1)).astype(w.dtype), eps)


@wrong("norm-centered", "gross", "The mean is taken off first.", "LayerNorm.")
class Centered(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        wide = self.widen(x)
        return super().rms_norm((wide - wide.mean(axis=1, keepdims=True)).astype(x.dtype), w, eps)


@wrong(
    "norm-squares-in-16-bits",
    "subtle",
    "The squares are added up in 16 bits.",
    "mean keeps the dtype; the sum ends where it is 256 times a square.",
)
class NarrowSquares(Correct):
    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        if x.dtype.itemsize != 2:
            return super().rms_norm(x, w, eps)
        total = np.zeros(len(x), x.dtype)
        for column in x.T:
            total = total + column * column
        root = np.sqrt(self.widen(total) / x.shape[1] + np.float32(eps))
        return (self.widen(x) / root[:, None] * self.widen(w)).astype(x.dtype)


@wrong("swiglu-exchanged", "gross", "gate and up are exchanged.", "w1 and w3.")
class Exchanged(Correct):
    def swiglu(self, gate: Array, up: Array) -> Array:
        return super().swiglu(up, gate)


@wrong("swiglu-gelu", "subtle", "gate is sent through GELU's tanh form.", "GeGLU.")
class Gelu(Correct):
    def swiglu(self, gate: Array, up: Array) -> Array:
        g = self.widen(gate)
        inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
        return (0.5 * g * (1 + np.tanh(inner)) * self.widen(up)).astype(gate.dtype)


@wrong(
    "swiglu-overflows",
    "subtle",
    "For gates below -89 the result is NaN.",
    "exp(-gate) overflows, and inf / inf follows.",
)
class Overflows(Correct):
    def swiglu(self, gate: Array, up: Array) -> Array:
        y = super().swiglu(gate, up)
        return np.where(self.widen(gate) < -89, y.dtype.type(np.nan), y).astype(gate.dtype)


@wrong("swiglu-slope-missing", "subtle", "dgate lacks the slope of σ.", "dgate = dy up σ.")
class SlopeMissing(Correct):
    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        _, dup = super().swiglu_backward(dy, gate, up)
        sigma = self.ops._sigmoid(self.widen(gate))
        return (self.widen(dy) * self.widen(up) * sigma).astype(gate.dtype), dup


@wrong("swiglu-dup-without-gate", "gross", "dup is dy σ.", "SiLU is taken for the logistic.")
class DupWithoutGate(Correct):
    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dgate, _ = super().swiglu_backward(dy, gate, up)
        sigma = self.ops._sigmoid(self.widen(gate))
        return dgate, (self.widen(dy) * sigma).astype(gate.dtype)


@wrong(
    "swiglu-gradient-cancels",
    "subtle",
    "1 - σ is computed by subtraction, in 16 bits.",
    "For large gates it is 0 in place of exp(-gate).",
)
class Cancels(Correct):
    def swiglu_backward(self, dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        dgate, dup = super().swiglu_backward(dy, gate, up)
        wide = self.widen(gate)
        sigma = self.ops._sigmoid(wide).astype(np.float16).astype(wide.dtype)
        slope = sigma * (1 + wide * (1 - sigma))
        return (self.widen(dy) * self.widen(up) * slope).astype(gate.dtype), dup


@wrong(
    "rope-positions-in-bfloat16",
    "subtle",
    "Positions are rounded to 8 bits: 257 is 256.",
    "They follow the model's dtype; beyond 256 neighbours share an angle.",
)
class PositionsRounded(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        p = np.asarray(position).astype(np.float64)
        step = 2.0 ** np.maximum(np.frexp(p)[1] - 8, 0)
        rounded = (np.rint(p / step) * step).astype(np.int64)
        return super().rope(x, rounded, head_dim, theta, layout, inverse)


@wrong("rope-other-layout", "gross", "The layouts are exchanged.", "is_neox.")
class OtherLayout(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        other = {"half": "interleaved", "interleaved": "half"}[layout]
        return super().rope(x, position, head_dim, theta, other, inverse)


@wrong("rope-always-forward", "subtle", "inverse is ignored.", "It is the last argument.")
class AlwaysForward(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        return super().rope(x, position, head_dim, theta, layout, False)


@wrong("rope-theta-fixed", "subtle", "theta is 10000, whatever is given.", "A constant.")
class ThetaFixed(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        return super().rope(x, position, head_dim, 10000.0, layout, inverse)


@wrong("rope-exponent-i-over-D", "subtle", "The exponent is -i / D.", "A step of 1 for one of 2.")
class Exponent(Correct):
    def rope(
        self, x: Array, position: Array, head_dim: int, theta: float, layout: str, inverse: bool
    ) -> Array:
        return super().rope(x, position, head_dim, theta**0.5, layout, inverse)


@wrong(
    "loss-ignored-labels-counted",
    "subtle",
    "The mean is over all rows, -100 or not.",
    "mean() of losses of which some are 0.",
)
class IgnoredCounted(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        nll, grad = super().cross_entropy(logits, labels)
        share = max(1, int((np.asarray(labels) != -100).sum())) / len(labels)
        return nll, (grad * grad.dtype.type(share)).astype(logits.dtype)


@wrong(
    "loss-ignored-is-the-last",
    "subtle",
    "A label of -100 counts as some token.",
    "A negative index counts from the end.",
)
class IgnoredIsLast(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        return super().cross_entropy(logits, np.asarray(labels) % logits.shape[1])


@wrong(
    "loss-overflows",
    "subtle",
    "exp of the logits as they are: beyond 88 the loss is infinite.",
    "The largest logit is not taken off first.",
)
class LossOverflows(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        nll, grad = super().cross_entropy(logits, labels)
        high = (logits.max(axis=1) > 88) & (np.asarray(labels) != -100)
        return np.where(high, np.inf, nll).astype(logits.dtype), grad


@wrong(
    "loss-vocabulary-in-blocks",
    "subtle",
    "Of a vocabulary beyond 1024 the last block is left out of the sum.",
    "n // block blocks.",
)
class VocabularyInBlocks(Correct):
    def cross_entropy(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        n = logits.shape[1]
        if n > 1024:
            logits = np.where(np.arange(n) >= n // 1024 * 1024, logits - 50, logits)
        return super().cross_entropy(logits.astype(logits.dtype), labels)


@wrong("adamw-l2", "subtle", "The decay is added to the gradient.", "Adam's weight_decay.")
class L2(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        g = (g + p * p.dtype.type(o.weight_decay)).astype(p.dtype)
        return super().adamw(p, g, m, v, replace(o, weight_decay=0.0))


@wrong("adamw-no-correction", "subtle", "The moments' bias is not corrected.", "BERT's Adam.")
class NoCorrection(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        return super().adamw(p, g, m, v, replace(o, step=10**9))


@wrong("adamw-eps-inside", "subtle", "eps is added inside the root.", "sqrt(v + eps).")
class EpsInside(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        _, m, v = super().adamw(p, g, m, v, o)
        f = p.dtype.type
        m_hat, v_hat = m / f(1 - o.beta1**o.step), v / f(1 - o.beta2**o.step)
        moved = f(o.lr) * m_hat / np.sqrt(v_hat + f(o.eps))
        return (p * f(1 - o.lr * o.weight_decay) - moved).astype(p.dtype), m, v


@wrong("adamw-step-from-0", "subtle", "The step is one too small after the first.", "t - 1.")
class StepFromZero(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        return super().adamw(p, g, m, v, replace(o, step=max(1, o.step - 1)))


@wrong(
    "adamw-second-moment-of-m",
    "subtle",
    "v averages the square of the new m, not of the gradient.",
    "The variable is overwritten a line before.",
)
class SecondOfM(Correct):
    def adamw(self, p: Array, g: Array, m: Array, v: Array, o: AdamW) -> tuple[Array, ...]:
        p1, m1, _ = super().adamw(p, g, m, v, o)
        return p1, m1, super().adamw(p, m1, m, v, o)[2]


@wrong("clip-each-alone", "subtle", "Each array is clipped by its own norm.", "A loop.")
class EachAlone(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        return [super(EachAlone, self).clip([g], limit)[0] for g in grads]


@wrong("clip-scales-up", "subtle", "Small gradients are scaled up to the limit.", "No min(1, …).")
class ScalesUp(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        norm = math.sqrt(sum(self.ops.sum_squares(g) for g in grads))
        return [self.scaled(g, limit / norm if norm else 1.0) for g in grads]


@wrong("clip-by-value", "gross", "Elements are cut at the limit.", "clip_grad_value_.")
class ByValue(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        return [np.clip(g, -limit, limit).astype(g.dtype) for g in grads]


@wrong("clip-square-norm", "gross", "The limit is divided by the norm's square.", "No root.")
class SquareNorm(Correct):
    def clip(self, grads: Sequence[Array], limit: float) -> list[Array]:
        square = sum(self.ops.sum_squares(g) for g in grads)
        return [self.scaled(g, min(1.0, limit / square) if square else 1.0) for g in grads]


@wrong("step-biases-decay", "subtle", "Biases decay too.", "One group of parameters.")
class BiasesDecay(Correct):
    def rates(self, name: str, lr: float, decay: float, ratio: float) -> tuple[float, float]:
        return (lr * ratio if name == "B" else lr), decay


@wrong("step-plus-on-A", "gross", "LoRA+ speeds up A.", "The wrong one of two letters.")
class PlusOnA(Correct):
    def rates(self, name: str, lr: float, decay: float, ratio: float) -> tuple[float, float]:
        return (lr * ratio if name == "A" else lr), (0.0 if name == "bias" else decay)


@wrong("step-plus-on-bias", "subtle", "LoRA+ speeds up the bias of B too.", "`'B' in name`.")
class PlusOnBias(Correct):
    def rates(self, name: str, lr: float, decay: float, ratio: float) -> tuple[float, float]:
        return (lr if name == "A" else lr * ratio), (0.0 if name == "bias" else decay)


@wrong("step-B-does-not-decay", "subtle", "B does not decay.", "B starts at zero anyway.")
class BDoesNotDecay(Correct):
    def rates(self, name: str, lr: float, decay: float, ratio: float) -> tuple[float, float]:
        return (lr * ratio if name == "B" else lr), (decay if name == "A" else 0.0)
