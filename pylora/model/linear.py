"""A frozen linear layer with an optional LoRA (Hu et al., "LoRA", 2021), forward and backward.

    y = x Wᵀ + bias + scale (drop(x) Aᵀ Bᵀ + bias_B)

An adapter with a magnitude (DoRA) rescales each output: see pylora.ops.dora. The lengths of the
rows of W + scale B A are computed at each forward, since training changes A and B in place; of W
alone they are computed once. W is packed once, and never changes unless it is trained itself
(`Own`). The adapter is plain data that may be set, swapped or taken away at any time; that copies
nothing. Also here: the gradients of an adapter and the key that dropout is drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pylora.errors import PlanError, ShapeError, expect
from pylora.numbers import random
from pylora.numbers.precision import Stored
from pylora.ops.dora import rescaled
from pylora.ops.protocol import Backend, Packed
from pylora.ops.whole import weight_grad, wide
from pylora.types import Array, Drop, LoRA, Projection, ProjectionGrad, brief


@dataclass(eq=False)
class LoRAGrad:
    """Gradients of one module's adapter, shaped like its arrays; None where it has none. Of a
    module that is trained whole (`Own`): those of its `weight` and `bias`."""

    __repr__ = brief

    A: Array
    B: Array
    bias: Array | None = None
    base_bias: Array | None = None
    magnitude: Array | None = None
    weight: Array | None = None

    def add(self, other: LoRAGrad) -> None:
        """Adds another gradient of the same module to this one, in place."""
        for name in ("A", "B", "bias", "base_bias", "magnitude", "weight"):
            mine = getattr(self, name)
            if mine is not None:
                mine += getattr(other, name)


Grads = dict[str, LoRAGrad]  # by module path


@dataclass(frozen=True)
class DropKey:
    """What a training step draws: the same key drops the same elements on every backend.

    A module's element is keyed by (seed, module path, step, row0 + row, column), so micro-batches
    of one step that state their first row as `row0` draw what the whole batch would.
    """

    seed: int
    step: int
    row0: int = 0
    noise: float = 0.0  # alpha of the noise on the embeddings (model/noise.py)

    def __post_init__(self) -> None:
        random.check_seed(self.seed)

    def from_row(self, row: int) -> DropKey:
        """The key of a micro-batch whose first row is this one of the rows that have this key."""
        return replace(self, row0=self.row0 + row)

    def of(self, path: str, lora: LoRA, first_row: int = 0) -> Drop | None:
        """The dropout of one module, of rows from `first_row` on; None if it has none."""
        if lora.dropout == 0:
            return None
        stream = random.stream("dropout", path, str(self.step))
        return Drop(lora.dropout, self.seed, stream, self.row0 + first_row)


def check_lora(path: str, lora: LoRA, d: int, k: int) -> None:
    """PlanError unless the adapter's arrays fit a module of d outputs and k inputs."""
    expect("LoRA", lora, path)
    r = lora.A.shape[0] if lora.A.ndim == 2 else "r"
    for name, array, shape in (
        ("A", lora.A, (r, k)),
        ("B", lora.B, (d, r)),
        ("bias", lora.bias, (d,)),
        ("base_bias", lora.base_bias, (d,)),
        ("magnitude", lora.magnitude, (d,)),
        ("norm", lora.norm, (d,)),
    ):
        if array is not None and tuple(array.shape) != shape:
            raise PlanError(
                f"{path}: {name} has shape {list(array.shape)}, expected {list(shape)} for a "
                f"module of {k} inputs and {d} outputs"
            )


def add_grad(grads: Grads, path: str, grad: LoRAGrad) -> None:
    """Puts a module's gradient in, or adds it to the one that is there."""
    if path in grads:
        grads[path].add(grad)
    else:
        grads[path] = grad


def is_packed(W: Any) -> bool:
    """Whether W is what a backend's `pack` gives, not an array or what a file stores."""
    return hasattr(W, "precision")


@dataclass(frozen=True, eq=False)
class Own:
    """What of a module is trained itself, beside or in place of an adapter (model/trained.py)."""

    __repr__ = brief

    path: str  # where its gradients go: a tied head's to the embedding
    bias: bool = False
    # Of a table of which single rows are trained, int64 [n]; None: all of the weight.
    rows: Array | None = None
    place: Array | None = None  # int64 [vocab]: the place of each row in `rows`, or n

    def add(self, ops: Backend, grads: Grads, dy: Array, x: Array) -> None:
        """Adds dW = dyᵀ x of the trained rows of W, and db, the sum of dy; x [m,k], dy [m,d]."""
        grad = grads.setdefault(self.path, LoRAGrad(None, None))
        some = dy if self.rows is None else dy[:, self.rows]
        grad.weight = weight_grad(ops, some, x, grad.weight)
        if self.bias:
            total = wide(ops, dy).sum(axis=0)
            grad.bias = total if grad.bias is None else grad.bias + total

    def add_rows(self, ops: Backend, grads: Grads, ids: Array, dy: Array, vocab: int) -> None:
        """The same of a table that rows ids [m] were taken from: dy [m, hidden]."""
        grad = grads.setdefault(self.path, LoRAGrad(None, None))
        dy = wide(ops, dy)
        if self.rows is None or self.place is None:
            dW = ops.embedding_backward(ids, dy, vocab)
        else:
            n = self.rows.size
            dW = ops.embedding_backward(self.place[ops.xp.asarray(ids)], dy, n + 1)[:n]
        grad.weight = dW if grad.weight is None else grad.weight + dW


def nonzero(a: Array | None) -> bool:
    """Whether there is anything to add: adding zeros could turn a -0.0 into 0.0."""
    return a is not None and bool((a != 0).any())


@dataclass(eq=False)
class LinearCache:
    """What backward needs. A layer that can compute x again may take it out and put it back."""

    __repr__ = brief

    x: Array | None  # [m, k]; None without an adapter
    h: Array | None  # [m, r]
    drop: Drop | None
    v: Array | None = None  # [m, d], with a magnitude: what was rescaled
    lora: LoRA | None = None  # with a magnitude: the adapter with the lengths that forward had


class LoRALinear:
    """One frozen linear module, named by its path, with an optional adapter in `.lora`."""

    def __init__(
        self,
        path: str,
        W: Array | Stored | Packed,
        bias: Array | None = None,
        *,
        ops: Backend,
        precision: str = "fp32",
    ) -> None:
        """W [d,k] is packed here unless it is a packed weight of `ops` already; bias [d]."""
        self.path, self.ops = path, ops
        self.W: Packed = W if is_packed(W) else ops.pack(W, precision)
        self.d, self.k = (int(n) for n in self.W.shape)
        self.bias = None if bias is None else ops.asarray(bias).copy()
        if bias is not None and bias.shape != (self.d,):
            raise ShapeError(f"{path}: bias has shape {bias.shape}, expected ({self.d},)")
        self._lora: LoRA | None = None
        self.own: Own | None = None  # what of W and bias is trained
        self._squares: Array | None = None  # of W's rows, once a magnitude asked for them

    def __repr__(self) -> str:
        adapter = "no adapter" if self._lora is None else f"adapter of rank {self._lora.rank}"
        return f"LoRALinear({self.path}: [{self.d}, {self.k}], {self.W.precision}, {adapter})"

    @property
    def trained(self) -> bool:
        """Whether backward has a gradient to compute here, for which it needs x."""
        return self._lora is not None or self.own is not None

    @property
    def lora(self) -> LoRA | None:
        """The adapter of this module, or None. Assigning checks it: PlanError, WrongTypeError."""
        return self._lora

    @lora.setter
    def lora(self, lora: LoRA | None) -> None:
        if lora is not None:
            self.check(lora)
        self._lora = lora

    def check(self, lora: LoRA) -> None:
        """PlanError unless the adapter fits this module."""
        check_lora(self.path, lora, self.d, self.k)

    def measured(self, lora: LoRA) -> LoRA:
        """The adapter with `norm`, the lengths of the rows of W + scale B A as they are now; itself
        where it has no magnitude, or was given lengths to go by."""
        if lora.magnitude is None or lora.norm is not None:
            return lora
        if self._squares is None:
            self._squares = self.ops.row_squares(self.W)
        return replace(lora, norm=self.ops.row_norms(self.W, lora, self._squares))

    def _bias(self) -> Array | None:
        """The bias in effect: base_bias where the adapter replaces it, plus scale * bias_B."""
        bias, lora = self.bias, self._lora
        if lora is None:
            return bias
        if lora.base_bias is not None:
            bias = lora.base_bias
        if not nonzero(lora.bias):
            return bias
        own = lora.bias * lora.bias.dtype.type(lora.scale)  # type: ignore[union-attr]
        return own if bias is None else bias + own

    def projection(
        self,
        drop: DropKey | None = None,
        first_row: int = 0,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> Projection:
        """What a backend is to compute for this module."""
        lora = self._lora
        dropped = drop.of(self.path, lora, first_row) if drop and lora is not None else None
        lora = lora if lora is None else self.measured(lora)
        return Projection(self.W, self._bias(), lora, dropped, residual, dtype)

    def forward(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        drop: DropKey | None = None,
        first_row: int = 0,
        dtype: Any = None,
    ) -> tuple[Array, LinearCache]:
        """x [m,k] -> y = residual + x Wᵀ + bias + LoRA [m,d], and the cache for backward."""
        self.check_input(x)
        p = self.projection(drop, first_row, residual, dtype)
        [y], [cache] = forward_together(self.ops, x, [p])
        cache.x = x if self.trained else None
        return y, cache

    def check_input(self, x: Array) -> None:
        """ShapeError unless x is [m, k]."""
        expect("array", x, f"{self.path}: forward")
        if x.ndim != 2 or x.shape[1] != self.k:
            raise ShapeError(f"{self.path}: x has shape {x.shape}, expected [m, {self.k}]")

    def backward(
        self,
        dy: Array,
        cache: LinearCache,
        grads: Grads,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> Array | None:
        """dy [m,d] -> dx [m,k] (plus `add`, which is given away), None unless `need_dx`.

        The adapter's gradients go into `grads` under this module's path, added to any there.
        """
        return backward_together(
            [self], [dy], [cache], cache.x, grads, add=add, need_dx=need_dx, dtype=dtype
        )


def projections_of(
    layers: Sequence[LoRALinear],
    x: Array,
    *,
    drop: DropKey | None = None,
    dtypes: Sequence[Any],
) -> list[Projection]:
    """Modules that read the same x [m,k], such as q, k and v, for one pass over it; y's dtypes."""
    layers[0].check_input(x)
    return [p.projection(drop, dtype=t) for p, t in zip(layers, dtypes, strict=True)]


def caches_of(
    projections: Sequence[Projection], results: Sequence[tuple[Array, Array | None]]
) -> list[LinearCache]:
    """What backward of such modules needs, without x; none of them has a magnitude."""
    return [LinearCache(None, h, p.drop) for p, (_, h) in zip(projections, results, strict=True)]


def forward_together(
    ops: Backend, x: Array, projections: Sequence[Projection]
) -> tuple[list[Array], list[LinearCache]]:
    """y of each of some modules of one x, and what backward needs, without x."""
    if not rescaled(projections):
        results = ops.linear_forward(x, projections)
        return [y for y, _ in results], caches_of(projections, results)
    plain = [p for p in projections if not rescaled([p])]
    rest = iter(ops.linear_forward(x, plain) if plain else [])
    ys, caches = [], []
    for p in projections:
        if p.lora is None or p.lora.magnitude is None:
            y, h = next(rest)
            caches.append(LinearCache(None, h, p.drop))
        else:
            y, h, v = ops.dora_forward(x, p.W, p.bias, p.lora, p.drop, p.residual, p.dtype)
            caches.append(LinearCache(None, h, p.drop, v, p.lora))
        ys.append(y)
    return ys, caches


def backward_together(
    layers: Sequence[LoRALinear],
    dys: Sequence[Array],
    caches: Sequence[LinearCache],
    x: Array | None,
    grads: Grads,
    *,
    add: Array | None = None,
    need_dx: bool = True,
    dtype: Any = None,
) -> Array | None:
    """The backward of modules that read the same x: dx = add + the sum of the modules'; None unless
    `need_dx`. `x` is needed where a module has an adapter, or is trained itself."""
    for p, dy in zip(layers, dys, strict=True):
        if p.own is not None:
            assert x is not None
            p.own.add(p.ops, grads, dy, x)
    trained = [
        (p, dy, c)
        for p, dy, c in zip(layers, dys, caches, strict=True)
        if need_dx or p.lora is not None
    ]
    if not trained:
        return None
    ops, dx, plain = layers[0].ops, add, []
    for p, dy, c in trained:
        if c.v is None or c.lora is None:
            plain.append((p, ProjectionGrad(dy, p.W if need_dx else None, c.h, p.lora, c.drop)))
            continue
        dx, dA, dB, dm = ops.dora_backward(
            dy, x, c.h, c.v, p.W, c.lora, c.drop, add=dx, need_dx=need_dx
        )
        add_grad(grads, p.path, LoRAGrad(dA, dB, *bias_grads(ops, dy, c.lora), dm))
    if not plain:
        return dx if dx is None or add is not None else ops.cast(dx, dtype)
    last = dtype if dx is add else None  # a sum with what is there already is rounded once
    found: Sequence[tuple[Array | None, Array | None]]
    dx, found = ops.linear_backward(
        x, [part for _, part in plain], add=dx, need_dx=need_dx, dtype=last
    )
    for (p, part), (dA, dB) in zip(plain, found, strict=True):
        if p.lora is not None:
            add_grad(grads, p.path, LoRAGrad(dA, dB, *bias_grads(p.ops, part.dy, p.lora)))
    rounded = dx is None or add is not None or last is not None
    return dx if rounded else ops.cast(dx, dtype)


def bias_grads(ops: Backend, dy: Array, lora: LoRA) -> tuple[Array | None, Array | None]:
    """Gradients of lora.bias (scale times the sum of the rows of dy) and of lora.base_bias."""
    if lora.bias is None and lora.base_bias is None:
        return None, None
    narrow = dy.dtype.itemsize == 2  # bfloat16 or float16
    total = (ops.cast(dy, np.float32) if narrow else dy).sum(axis=0)
    return (
        None if lora.bias is None else total * total.dtype.type(lora.scale),
        None if lora.base_bias is None else total.copy(),
    )
