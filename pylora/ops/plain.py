"""Operations that are made of a backend's others: on many arrays at once, in place, on rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pylora.errors import DtypeError, ShapeError
from pylora.numbers.precision import as_dtype
from pylora.ops.composed import Composed
from pylora.ops.dora import Dora
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.mixture import Choice, choose
from pylora.ops.protocol import Backend
from pylora.ops.repeat import Direct, Repeated
from pylora.types import AdamW, Array, LoRA, Norm, Projection, ProjectionGrad, Rotation


def want_writable(W: Array) -> None:
    """ShapeError for a weight in host memory that may not be written to."""
    if isinstance(W, np.ndarray) and not W.flags.writeable:
        raise ShapeError("W is merged into in place, but the array is read-only")


def _normed(ops: Backend, x: Array, norm: Norm | None, dtype: Any) -> tuple[Array, Array | None]:
    return (x, None) if norm is None else ops.norm_forward(x, norm, dtype)


class Plain(Dora):
    """Operations that are made of others, for a backend that has no better."""

    def __repr__(self) -> str:
        return f"<pylora backend {getattr(self, 'name', type(self).__name__)!r}>"

    def merge_in_place(self: Backend, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        """W becomes the weight that `merge` gives. What rounding loses is not kept, so that no
        `unmerge` of it is exact."""
        want_writable(W)
        merged, _ = self.merge(W, lora, dtype)
        if merged.dtype != W.dtype:
            raise DtypeError(f"W: stored as {dtype} must be an array of {merged.dtype}")
        W[...] = merged

    def adamw_steps(
        self: Backend, updates: Sequence[tuple[Array, Array, Array, Array, AdamW]]
    ) -> None:
        """`adamw_step` of each (param, grad, m, v, settings); a backend may do them together."""
        for update in updates:
            self.adamw_step(*update)

    def total_squares(self: Backend, arrays: Sequence[Array]) -> float:
        """The sums of squares of the arrays, added up in order in float64."""
        return sum(self.sum_squares(x) for x in arrays)

    def cast(self, x: Array, dtype: Any = None) -> Array:
        """x in `dtype`, which may be BF16; x itself if it is that already, or for None."""
        return as_dtype(x, dtype)

    def linear_forward(
        self: Backend, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[Array, Array | None]]:
        """`lora_forward` of several modules that read the same x: (y, h) of each."""
        return [
            self.lora_forward(x, p.W, p.bias, p.lora, p.drop, p.residual, p.dtype)
            for p in projections
        ]

    def linear_backward(
        self: Backend,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]:
        """`lora_backward` of several: dx = add + the sum of theirs, and (dA, dB) of each."""
        dx, grads = add, []
        for p in projections:
            train = p.lora is not None
            part, dA, dB = self.lora_backward(
                p.dy, x, p.h, p.W, p.lora, p.drop, add=dx,
                need_dx=need_dx, need_dA=train, need_dB=train,
            )  # fmt: skip
            dx = part if need_dx else None
            grads.append((dA, dB))
        return (dx if dx is None or add is not None else as_dtype(dx, dtype)), grads

    def llama(self, weights: LlamaWeights) -> LlamaOp:
        """The operations as a whole model, for inference: see pylora.ops.composed."""
        return Composed(self, weights)

    def qkv_forward(
        self: Backend,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        rotation: Rotation | None = None,
        dtype: Any = None,
    ) -> tuple[list[tuple[Array, Array | None]], Array | None]:
        """`linear_forward` of q, k and v, of the norm of x where there is one, and q and k rotated
        where that is asked for. Returns ((y, h) of each, the norm's rstd).

        The normed x and what is rotated are rounded to `dtype`; q and k to their own before, if
        they have one. A backend may do it in one pass, with the same result."""
        x, rstd = _normed(self, x, norm, dtype)
        results = self.linear_forward(x, projections)
        if rotation is not None:
            r = rotation
            for i, (y, h) in enumerate(results[:2]):
                turned = self.rope(y, r.cos, r.sin, r.position, r.head_dim, r.layout, dtype=dtype)
                results[i] = turned, h
        return results, rstd

    def gate_up_forward(
        self: Backend,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        dtype: Any = None,
        activation: str = "silu",
    ) -> tuple[list[tuple[Array, Array | None]], Array, Array | None]:
        """`linear_forward` of gate and up, of the norm of x where there is one, and their product
        act(gate) up. Returns ((y, h) of both, the product, the norm's rstd)."""
        x, rstd = _normed(self, x, norm, dtype)
        results = self.linear_forward(x, projections)
        product = self.activation_forward(results[0][0], results[1][0], activation, dtype)
        return results, product, rstd

    def norm_forward(self: Backend, x: Array, norm: Norm, dtype: Any = None) -> tuple[Array, Array]:
        """(y, rstd) of a norm of either kind."""
        if norm.kind == "layer":
            return self.layer_norm_forward(x, norm.w, norm.b, norm.eps, dtype)
        return self.rms_norm_forward(x, norm.w, norm.eps, dtype)

    def norm_backward(
        self: Backend, dy: Array, x: Array, norm: Norm, rstd: Array, add: Array | None = None
    ) -> Array:
        """dx, plus `add`, which is given away. The norm's own numbers are frozen."""
        if norm.kind == "layer":
            return self.layer_norm_backward(dy, x, norm.w, rstd, add)
        return self.rms_norm_backward(dy, x, norm.w, rstd, add)[0]

    def choose(self: Backend, logits: Array, top_k: int, normalize: bool) -> Choice:
        """The experts of each token, from the router's logits [m, experts]: `mixture.choose`."""
        return choose(logits, top_k, normalize, self.to_numpy, self.xp)

    def repeated(self) -> Repeated:
        return Direct(self)

    def take_rows(self, x: Array, rows: Array) -> Array:
        """x[rows]; rows int64, where the backend computes."""
        return x[rows]

    def put_rows(self, y: Array, rows: Array, x: Array) -> None:
        """y[rows] = x, in y's type; each row once."""
        y[rows] = x
