"""Linear layers with LoRA on the C core: one or several projections of one x, forward and backward,
alone or together with the norm before and what follows (rotation, SwiGLU).

A row of one token costs some microseconds here, as much as its product with a small weight: what
is on that way is looked up once and makes no object that it could do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import (
    F32,
    Packed,
    activation_of,
    adapter_of,
    adapter_or_struct,
    at,
    fields,
    ints,
    layout_of,
    mat,
    norm_struct,
    owned,
    read,
    read_any,
    shape_of,
    want_inputs,
)
from pylora.errors import ShapeError
from pylora.numbers.precision import BF16, as_dtype
from pylora.ops.dora import factor, low_rank, measured, rescaled
from pylora.ops.plain import Plain
from pylora.ops.protocol import Backend
from pylora.types import Array, Drop, LoRA, Norm, Projection, ProjectionGrad, Rotation

_LINEARS = ffi.typeof("pylora_linear[]")
_INT64 = ffi.typeof("int64_t *")


def _kind(dtype: Any) -> int:
    return int(lib.PYLORA_BF16 if dtype is not None and dtype == BF16 else lib.PYLORA_F32)


def _mixed(projections: Sequence[Projection]) -> bool:
    """Whether their weights have several formats, as those of a file may: one call takes one."""
    return len({shape_of(p.W) and p.W.struct.dtype for p in projections}) > 1


class Linear(Core):
    """`lora_*`, `linear_*`, `qkv_forward` and `gate_up_forward`."""

    def lora_forward(
        self,
        x: Array,
        W: Packed,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        # `_together` for one, in half the time: the structs are made on the stack (see `fields`).
        if lora is not None and lora.magnitude is not None:
            return self.linear_forward(x, [Projection(W, bias, lora, drop, residual, dtype)])[0]
        d, k = shape_of(W)
        x = read_any("x", x, None, k)
        m, rank, empty = x.shape[0], 0, self._pool.empty
        y = empty((m, d), F32 if dtype is None else dtype)
        h = alive = None
        low = hs = bs = rs = ffi.NULL
        if lora is not None:
            one, alive = adapter_of(W, lora, drop)
            low, rank = one[0], lora.A.shape[0]
            h = empty((m, rank), F32)
            hs = [fields(h)]
        if bias is not None:
            bs = at(np.ascontiguousarray(read("bias", bias, d)))  # such a pointer holds its array
        if residual is not None:
            residual = read("residual", residual, m, d)
            rs = [fields(residual)]
        self._in_scratch(
            "linear_forward",
            lib.pylora_lora_workspace, (m, d, k, rank),
            lib.pylora_lora_forward, ([fields(x)], W.struct, bs, low, rs, [fields(y)], hs),
        )  # fmt: skip
        return y, h

    def linear_forward(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        n = len(projections)
        if rescaled(projections):
            return self._rescaled(x, projections)
        if n == 1:
            p = projections[0]
            return [self.lora_forward(x, p.W, p.bias, p.lora, p.drop, p.residual, p.dtype)]
        if _mixed(projections):
            return [self.linear_forward(x, [p])[0] for p in projections]
        return self._together("linear_forward", x, projections, [p.dtype for p in projections])[0]

    def _rescaled(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """`linear_forward` with magnitudes: in one pass where nothing is dropped."""
        ops, results = cast(Backend, self), []
        for p in projections:
            lora = p.lora
            if lora is None or lora.magnitude is None:
                results += self.linear_forward(x, [p])
            elif p.drop is not None and p.drop.p:
                both = ops.dora_forward(x, p.W, p.bias, lora, p.drop, p.residual, p.dtype)
                results.append(both[:2])
            else:
                f = factor(measured(ops, p.W, lora), np)
                f = np.ascontiguousarray(read("magnitude", f, shape_of(p.W)[0]))
                one = Projection(p.W, p.bias, low_rank(lora), None, p.residual, p.dtype)
                results += self._together("linear_forward", x, [one], [p.dtype], factor=f)[0]
        return results

    def _together(
        self,
        op: str,
        x: Array,
        projections: Sequence[Projection],
        dtypes: Sequence[Any],
        norm: Norm | None = None,
        dtype: Any = None,
        finish: Any = ffi.NULL,
        factor: np.ndarray | None = None,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray | None]:
        """Projections of one x, whose y are of `dtypes`; and the rstd of the norm, of `dtype`.
        `factor` [d] is that of all of them."""
        n = len(projections)
        x = read_any("x", x, None, shape_of(projections[0].W)[1] if n else None)
        (m, k), empty = x.shape, self._pool.empty
        rows, results, outputs, ranks = [], [], 0, 0
        keep: list[Any] = []
        first, rstd, scaled = ffi.NULL, None, ffi.NULL
        if factor is not None:
            scaled = ffi.new("float *[1]", [at(factor)])
        if norm is not None:
            rstd = np.empty(m, np.float32)
            first, alive = norm_struct(norm, k, _kind(dtype), at(rstd))
            keep.append(alive)
        for p, kind in zip(projections, dtypes, strict=True):
            d, _ = want_inputs(p.W, k)
            y, h = empty((m, d), F32 if kind is None else kind), None
            lora, alive = ffi.NULL, None
            if p.lora is not None:
                lora, alive = adapter_of(p.W, p.lora, p.drop)
                h = empty((m, rank := p.lora.rank), F32)
                ranks += rank
            bias = None if p.bias is None else np.ascontiguousarray(read("bias", p.bias, d))
            residual = None if p.residual is None else read("residual", p.residual, m, d)
            rows.append((p.W.struct, at(bias), lora, mat(residual), mat(y), mat(h), scaled))
            keep += alive, bias, residual
            outputs += d
            results.append((y, h))
        self._in_scratch(
            op,
            lib.pylora_linear_workspace, (m, n, outputs, k, ranks),
            lib.pylora_fused_forward,
            (mat(x), first, n, ffi.new(_LINEARS, rows), finish, 1, ffi.NULL),
        )  # fmt: skip
        return results, rstd

    def qkv_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        rotation: Rotation | None = None,
        dtype: Any = None,
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray | None]:
        q, k, v = projections
        rounded = rotation is not None and (q.dtype is not None or k.dtype is not None)
        if _mixed(projections) or rounded or rescaled(projections):
            return Plain.qkv_forward(cast(Backend, self), x, projections, norm, rotation, dtype)
        op, dtypes = "qkv_forward", [q.dtype, k.dtype, v.dtype]
        x = read_any("x", x, None, shape_of(q.W)[1])
        if rotation is None:
            return self._together(op, x, projections, dtypes, norm, dtype)
        cos = read("cos", rotation.cos, None, None)
        sin = read("sin", rotation.sin, *cos.shape)
        position = ints("position", rotation.position, x.shape[0])
        turn = ffi.new("pylora_rotation *")
        turn.cosines, turn.sines, turn.position = mat(cos)[0], mat(sin)[0], at(position, _INT64)
        turn.head_dim, turn.layout = rotation.head_dim, layout_of(rotation.layout)
        finish = ffi.new("pylora_finish[3]", [(turn,), (turn,)])
        return self._together(op, x, projections, [dtype, dtype, v.dtype], norm, dtype, finish)

    def gate_up_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        dtype: Any = None,
        activation: str = "silu",
    ) -> tuple[list[tuple[np.ndarray, np.ndarray | None]], np.ndarray, np.ndarray | None]:
        ops = cast(Backend, self)
        if _mixed(projections) or rescaled(projections):
            return Plain.gate_up_forward(ops, x, projections, norm, dtype, activation)
        gate, up = projections
        x = read_any("x", x, None, shape_of(up.W)[1])
        product = self.empty((x.shape[0], shape_of(up.W)[0]), F32 if dtype is None else dtype)
        to = mat(product)
        finish = ffi.new("pylora_finish[2]", [(), (ffi.NULL, to, activation_of(activation))])
        results, rstd = self._together(
            "gate_up_forward", x, projections, [gate.dtype, up.dtype], norm, dtype, finish
        )
        return results, product, rstd

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
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        projection = ProjectionGrad(dy, W, h, lora, drop)
        dx, [(dA, dB)] = self._backward(
            x, [projection], add, need_dx, need_dA, need_dB, dtype, "lora_backward"
        )
        return dx, dA, dB

    def linear_backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[np.ndarray | None, list[tuple[np.ndarray | None, np.ndarray | None]]]:
        kinds = {p.W.struct.dtype for p in projections if p.W is not None}
        if len(kinds) < 2:
            return self._backward(
                x, projections, add, need_dx, True, True, dtype, "linear_backward"
            )
        dx, grads = add, []  # a file may mix formats
        for p in projections:
            dx, one = self._backward(x, [p], dx, need_dx, True, True, None, "linear_backward")
            grads += one
        return (dx if dtype is None or add is not None else as_dtype(dx, dtype)), grads

    def _backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        add: Array | None,
        need_dx: bool,
        need_dA: bool,
        need_dB: bool,
        dtype: Any,
        op: str,
    ) -> tuple[np.ndarray | None, list[tuple[np.ndarray | None, np.ndarray | None]]]:
        n = len(projections)
        first = projections[0]
        m = first.dy.shape[0]
        k = int(first.lora.A.shape[1]) if first.lora is not None else shape_of(first.W)[1]
        rows, keep, results, outputs, ranks = ffi.new("pylora_linear_grad[]", n), [], [], 0, 0
        used_x = need_dA and any(p.lora is not None for p in projections)
        x = read_any("x", x, m, k) if used_x else None
        for row, p in zip(rows, projections):
            d = shape_of(p.W)[0] if p.W is not None else None
            dy = read_any("dy", p.dy, m, d)
            d = dy.shape[1]
            low, *alive = adapter_or_struct(p.W, p.lora, p.drop, d, k)
            h = dA = dB = None
            if p.lora is not None:
                ranks += p.lora.rank
                if need_dA:
                    dA = self.empty((p.lora.rank, k))
                if need_dB:
                    h = read("h", p.h, m, p.lora.rank)
                    dB = self.empty((d, p.lora.rank))
            if need_dx:
                if shape_of(p.W) != (d, k):
                    raise ShapeError(f"W must be [{d}, {k}], got {list(shape_of(p.W))}")
                row.W = p.W.struct
            mats = [mat(a) for a in (dy, h, dA, dB)]
            row.lora, row.dy, row.h, row.dA, row.dB = low, *mats
            keep += [low, alive, dy, h, mats]
            outputs += d
            results.append((dA, dB))
        dx = None
        if need_dx and add is not None:
            dx = owned("add", add, m, k)
        elif need_dx:
            dx = self.empty((m, k), F32 if dtype is None else dtype)
        self._in_scratch(
            op,
            lib.pylora_linear_workspace, (m, n, outputs, k, ranks),
            lib.pylora_linear_backward, (mat(x), n, rows, mat(dx), add is not None),
        )  # fmt: skip
        return dx, results
