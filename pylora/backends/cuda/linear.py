"""Linear layers with LoRA on the CUDA library: several projections of one x, segments of its rows
with an adapter each, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from pylora.backends.cuda.marshal import F32, Packed, packed
from pylora.backends.cuda.precision import Precision
from pylora.errors import ShapeError
from pylora.ops.dora import rescaled
from pylora.ops.protocol import Backend
from pylora.types import Array, Drop, LoRA, Projection, ProjectionGrad


class Linear(Precision):
    """`lora_*`, `linear_*` and `segmented`."""

    def lora_forward(
        self,
        x: Array,
        W: Packed,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None]:
        return self.linear_forward(x, [Projection(W, bias, lora, drop, residual, dtype)])[0]

    def linear_forward(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[Array, Array | None]]:
        if rescaled(projections):
            return [self._alone(x, p) for p in projections]
        kinds = {packed(p.W).precision for p in projections}
        if len(kinds) > 1:
            return [self.linear_forward(x, [p])[0] for p in projections]
        structs, results = [], []
        m, k = x.shape[0], packed(projections[0].W).shape[1] if projections else 0
        for p in projections:
            low, keep = self.to.lora(p.lora, p.drop, *p.W.shape)
            h = None if p.lora is None else self.empty((m, p.lora.rank))
            structs.append((p, [low], h, keep))
        x = self.to.read("x", x, None, k)
        ys = self.segmented(x, [(p, lows, h) for p, lows, h, _ in structs], None)
        results = [(y, h) for y, (_, _, h, _) in zip(ys, structs)]
        return results

    def _alone(self, x: Array, p: Projection) -> tuple[Array, Array | None]:
        """One projection, which may have a magnitude."""
        if p.lora is None or p.lora.magnitude is None:
            return self.linear_forward(x, [p])[0]
        ops = cast(Backend, self)
        return ops.dora_forward(x, p.W, p.bias, p.lora, p.drop, p.residual, p.dtype)[:2]

    def segmented(
        self,
        x: Array,
        parts: Sequence[tuple[Projection, Sequence[Any], Array | None]],
        start: Sequence[int] | None,
    ) -> list[Array]:
        """y of each (projection, pylora_lora of each segment, h): rows start[i] .. start[i+1]-1 of
        x are segment i. Of a projection its adapter and dropout are not read."""
        ffi, to, n = self.ffi, self.to, len(parts)
        segments = 1 if start is None else len(start) - 1
        rows, keep, ys, outputs, ranks = ffi.new("pylora_linear[]", n), [], [], 0, 0
        m, k = x.shape
        for row, (p, lows, h) in zip(rows, parts):
            d, inputs = packed(p.W).shape
            if inputs != k:
                raise ShapeError(f"x must have the shape [any, {inputs}], got {list(x.shape)}")
            y = self.empty((m, d), F32 if p.dtype is None else p.dtype)
            row.W, row.y, row.h = p.W.struct, (cy := to.mat(y)), (ch := to.mat(h))
            keep += [cy, ch]
            if any(low != ffi.NULL for low in lows):
                row.lora = table = ffi.new("pylora_lora *[]", list(lows))
                keep.append(table)
                ranks += max(int(low.r) for low in lows if low != ffi.NULL)
            if p.bias is not None:
                bias = to.vector("bias", p.bias, d)
                row.bias = to.at(bias)
                keep.append(bias)
            if p.residual is not None:
                residual = to.read("residual", p.residual, m, d, narrow=False)
                row.residual = res = to.mat(residual)
                keep += [residual, res]
            outputs += d
            ys.append(y)
        need = self.lib.pylora_cuda_linear_workspace(
            self.context, m, n, outputs, k, ranks, segments
        )
        seg = ffi.NULL if start is None else ffi.new("int64_t[]", [int(s) for s in start])
        self.call("linear_forward", to.mat(x), n, rows, segments, seg, *self.workspace(need))
        return ys

    def lora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        W: Packed | None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        need_dA: bool = True,
        need_dB: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array | None, Array | None]:
        one = [ProjectionGrad(dy, W, h, lora, drop)]
        dx, [(dA, dB)] = self._backward(x, one, add, need_dx, need_dA, need_dB, dtype)
        return dx, dA, dB

    def linear_backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]:
        kinds = {p.W.precision for p in projections if p.W is not None}
        if len(kinds) < 2:
            return self._backward(x, projections, add, need_dx, True, True, dtype)
        dx, grads = add, []
        for p in projections:
            dx, one = self._backward(x, [p], dx, need_dx, True, True, None)
            grads += one
        return (dx if dx is None or add is not None else self.cast(dx, dtype)), grads

    def _backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        add: Array | None,
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        dtype: Any,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]:
        ffi, to, n, first = self.ffi, self.to, len(projections), projections[0]
        m = first.dy.shape[0]
        k = int(first.lora.A.shape[1]) if first.lora is not None else packed(first.W).shape[1]
        rows, keep, results = ffi.new("pylora_linear_grad[]", n), [], []
        outputs = ranks = 0
        used_x = need_dA and any(p.lora is not None for p in projections)
        x = to.read("x", x, m, k) if used_x else None
        for row, p in zip(rows, projections):
            d = packed(p.W).shape[0] if p.W is not None else None
            dy = to.read("dy", p.dy, m, d)
            d = int(dy.shape[1])
            low, alive = to.lora(p.lora, p.drop, d, k)
            h = dA = dB = None
            if p.lora is not None:
                ranks += p.lora.rank
                dA = self._gradient((p.lora.rank, k)) if need_dA else None
                if need_dB:
                    h = to.read("h", p.h, m, p.lora.rank)
                    dB = self._gradient((d, p.lora.rank))
            if need_dx:
                if packed(p.W).shape != (d, k):
                    raise ShapeError(f"W must be [{d}, {k}], got {list(p.W.shape)}")
                row.W = p.W.struct
            mats = [to.mat(a) for a in (dy, h, dA, dB)]
            row.lora, row.dy, row.h, row.dA, row.dB = low, *mats
            keep += [low, alive, dy, h, mats]
            outputs += d
            results.append((dA, dB))
        dx = None
        if need_dx and add is not None:
            dx = to.read("add", add, m, k, narrow=False)
        elif need_dx:
            dx = self.empty((m, k), F32 if dtype is None else dtype)
        need = self.lib.pylora_cuda_linear_workspace(self.context, m, n, outputs, k, ranks, 1)
        self.call(
            "linear_backward", to.mat(x), n, rows, to.mat(dx), add is not None,
            *self.workspace(need),
        )  # fmt: skip
        return dx, results
