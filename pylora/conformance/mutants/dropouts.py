"""Dropout and its backward pass."""

from __future__ import annotations

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong
from pylora.reference import Reference
from pylora.types import Array, Drop


@wrong(
    "dropout-not-rescaled",
    "gross",
    "Kept elements are not multiplied by 1 / (1 - p).",
    "The factor was put into evaluation, as in the first papers on dropout, and then lost.",
)
class NotRescaled(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        return super().dropout_forward(x, W, A, B, scale * (1 - p), p, seed)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        return super().dropout_backward(dy, x, W, A, B, scale * (1 - p), p, seed)


@wrong(
    "dropout-ignored",
    "gross",
    "Dropout is a setting that nothing reads.",
    "The rate is stored in the layer and never wired in.",
    "paiml/aprender#2170",
)
class Ignored(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        return self.forward(x, W, A, B, scale)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        return super().dropout_backward(dy, x, W, A, B, scale, 0.0, seed)


@wrong(
    "dropout-keeps-p",
    "gross",
    "p is taken for the probability of keeping.",
    "keep_prob in one framework is rate in the next.",
)
class KeepsP(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        return super().dropout_forward(x, W, A, B, scale, 1 - p if p else 0.0, seed)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        return super().dropout_backward(dy, x, W, A, B, scale, 1 - p if p else 0.0, seed)


@wrong(
    "dropout-on-h",
    "subtle",
    "h is dropped, not x. The expected output is the same.",
    "The layer is written B(drop(A(x))).",
)
class OnH(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        ops, wide = self.ops, [self.widen(a) for a in (x, A, B)]
        y = self.widen(self.base(x, W))
        if wide[2].any():
            h = ops.dropout(ops._rows(wide[0], wide[1].T), self.drop(p, seed))
            y = y + wide[0].dtype.type(scale) * ops._rows(h, wide[2].T)
        return y.astype(x.dtype)

    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        ops, drop = self.ops, self.drop(p, seed)
        dy, x, W, A, B = (self.widen(a) for a in (dy, x, W, A, B))
        s = dy.dtype.type(scale)
        g = ops.dropout(ops._rows(dy, B), drop)
        dB = s * (dy.T @ ops.dropout(ops._rows(x, A.T), drop))
        return ops._rows(dy, W) + s * ops._rows(g, A), s * (g.T @ x), dB


@wrong(
    "dropout-on-base-too",
    "gross",
    "The base sees the dropped x as well.",
    "x = dropout(x) at the head of the layer.",
)
class OnBaseToo(Correct):
    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        dropped = self.ops.dropout(self.widen(x), self.drop(p, seed)).astype(x.dtype)
        return self.forward(dropped, W, A, B, scale)


@wrong(
    "dropout-while-evaluating",
    "gross",
    "forward() drops as well, with p = 0.1.",
    "The new module is in training mode although the model that it is put into is not.",
    "huggingface/peft#3766",
)
class WhileEvaluating(Correct):
    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        if x.dtype.kind == "c":
            return super().forward(x, W, A, B, scale, bias)
        y = self.widen(super().dropout_forward(x, W, A, B, scale, 0.1, 1))
        return (y if bias is None else y + self.widen(bias)).astype(x.dtype)


@wrong(
    "dropout-new-mask-backward",
    "subtle",
    "The backward pass draws another mask.",
    "Recomputation without the state of the generator.",
)
class NewMaskBackward(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        return super().dropout_backward(dy, x, W, A, B, scale, p, seed + 1)


@wrong(
    "db-from-undropped-x",
    "subtle",
    "dB is computed from x before dropout.",
    "h is recomputed to save memory, and the mask is forgotten.",
)
class DbFromUndropped(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        dx, dA, _ = super().dropout_backward(dy, x, W, A, B, scale, p, seed)
        return dx, dA, super().dropout_backward(dy, x, W, A, B, scale, 0.0, seed)[2]


@wrong(
    "da-from-undropped-x",
    "subtle",
    "dA is computed from x before dropout.",
    "The x that is saved is the one that the base needs as well.",
)
class DaFromUndropped(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        dx, _, dB = super().dropout_backward(dy, x, W, A, B, scale, p, seed)
        return dx, super().dropout_backward(dy, x, W, A, B, scale, 0.0, seed)[1], dB


@wrong(
    "dx-without-mask",
    "subtle",
    "The adapter's part of dx is not masked.",
    "dA and dB are right, so that the layer's own test passes.",
    "foundation-model-stack/fms-acceleration#97",
)
class DxWithoutMask(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        _, dA, dB = super().dropout_backward(dy, x, W, A, B, scale, p, seed)
        return super().dropout_backward(dy, x, W, A, B, scale, 0.0, seed)[0], dA, dB


@wrong(
    "dx-masked-not-rescaled",
    "subtle",
    "The adapter's part of dx is masked, but lacks 1 / (1 - p).",
    "The mask was saved as bits, and the factor is not in the bits.",
)
class DxNotRescaled(Correct):
    def dropout_backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> tuple[Array, ...]:
        _, dA, dB = super().dropout_backward(dy, x, W, A, B, scale, p, seed)
        return super().dropout_backward(dy, x, W, A, B, scale * (1 - p), p, seed)[0], dA, dB


@wrong(
    "dropout-seed-moves-on",
    "subtle",
    "Each call draws another mask, whatever the seed.",
    "One generator for the whole program: recomputing a layer drops other elements.",
)
class SeedMovesOn(Correct):
    calls = 0

    def drop(self, p: float, seed: int) -> Drop | None:
        self.calls += 1
        return super().drop(p, seed + self.calls)


@wrong(
    "dropout-seed-ignored",
    "subtle",
    "Every seed gives the same mask.",
    "The stream is numbered by the module and not by the step as well.",
)
class SeedIgnored(Correct):
    def drop(self, p: float, seed: int) -> Drop | None:
        return super().drop(p, 0)


class _OneMaskForAllRows(Reference):
    def dropout(self, x: Array, drop: Drop | None) -> Array:
        if drop is None or drop.p == 0 or not x.shape[0]:
            return super().dropout(x, drop)
        row = super().dropout(self.xp.ones_like(x[:1]), drop)
        return self.xp.where(row == 0, x.dtype.type(0), x * row)


@wrong(
    "dropout-one-mask-for-all-rows",
    "subtle",
    "All rows of a batch lose the same elements.",
    "A mask of the shape of one row, broadcast. Its expectation and its backward pass are right.",
)
class OneMaskForAllRows(Correct):
    ops = _OneMaskForAllRows()
