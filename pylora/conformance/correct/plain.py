"""A correct implementation of every method of the protocol, in NumPy: pylora's reference, adapted.

The kit is tested with it, its mutants are made from it (each overrides one method), and it is an
example of an adapter that leaves nothing out. It is slow and takes every dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.conformance.correct.adapted import Adapted
from pylora.conformance.correct.attending import Attending
from pylora.conformance.correct.base import by_adapter
from pylora.conformance.correct.beginnings import Beginnings
from pylora.conformance.correct.families import Families
from pylora.conformance.correct.layers import Layers
from pylora.conformance.correct.weighted import Weighted
from pylora.conformance.protocol import LoraTriple
from pylora.model.config import ModuleSpec
from pylora.numbers import random
from pylora.types import Array, Drop, LoRA

Batch = tuple[Array, Array, Array]  # (x [m,k], target [m,d], counted [m] bool)


class Correct(Adapted, Weighted, Layers, Attending, Families, Beginnings):
    """Every capability. Subclass it and override one method to make a wrong implementation.

    bfloat16 and float16 are computed in float32 and rounded once; merges of them too.
    """

    name = "pylora reference"
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16", "complex128")
    file_format = "peft"
    thread_safe = True
    bitwise = True
    exact_unmerge = True
    init_methods = ("kaiming", "gaussian", "false")
    bits = True

    # ---- one adapter --------------------------------------------------------------------------

    def forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, bias: Array | None = None
    ) -> Array:
        wide = [self.widen(a) for a in (x, W, A, B, bias)]
        y, _ = self.ops.lora_forward(wide[0], wide[1], wide[4], LoRA(wide[2], wide[3], scale))
        return y.astype(x.dtype)

    def base(self, x: Array, W: Array, bias: Array | None = None) -> Array:
        y, _ = self.ops.lora_forward(self.widen(x), self.widen(W), self.widen(bias))
        return y.astype(x.dtype)

    def stored(self, W: Array) -> Array:
        """The values that are kept of W: all of them. rounded.py has others."""
        return W

    def backward(
        self, dy: Array, x: Array, W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, ...]:
        return self.dropout_backward(dy, x, W, A, B, scale, 0.0, 0)

    def loss_gradients(
        self, batches: Sequence[Batch], W: Array, A: Array, B: Array, scale: float
    ) -> tuple[Array, Array]:
        """Sums of each micro-batch's gradients, every row weighted by 1 / all counted rows."""
        total = sum(int(counted.sum()) for _, _, counted in batches)
        wide: Any = np.result_type(A.dtype.type(0), np.float32)
        dA, dB = np.zeros(A.shape, wide), np.zeros(B.shape, wide)
        for x, target, counted in batches:
            weight = np.where(counted, 1 / max(total, 1), 0).astype(x.dtype)
            off = self.forward(x, W, A, B, scale) - target
            dy = np.where(counted[:, None], off, off.dtype.type(0)) * weight[:, None]
            _, gA, gB = self.backward(dy, x, W, A, B, scale)[:3]
            dA, dB = dA + gA, dB + gB
        return dA.astype(A.dtype), dB.astype(B.dtype)

    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return alpha / math.sqrt(r) if use_rslora else alpha / r

    def init(self, d: int, k: int, r: int, seed: int, method: str) -> tuple[Array, Array]:
        stream = random.stream("init", "module")
        if method == "gaussian":
            A = random.normal((r, k), 1 / r, seed=seed, stream=stream)
        else:
            A = random.uniform((r, k), 1 / math.sqrt(k), seed=seed, stream=stream)
        if method == "false":
            stream = random.stream("init", "module", "B")
            return A, random.uniform((d, r), 1 / math.sqrt(r), seed=seed, stream=stream)
        return A, np.zeros((d, r), np.float32)

    # ---- dropout ------------------------------------------------------------------------------

    def drop(self, p: float, seed: int) -> Drop | None:
        """The mask of a seed; None without dropout."""
        stream = random.stream("dropout", "module", "0")
        return Drop(p, random.check_seed(seed), stream) if p else None

    def dropout_forward(
        self, x: Array, W: Array, A: Array, B: Array, scale: float, p: float, seed: int
    ) -> Array:
        wide = [self.widen(a) for a in (x, W, A, B)]
        lora = LoRA(wide[2], wide[3], scale, p)
        y, _ = self.ops.lora_forward(wide[0], wide[1], None, lora, self.drop(p, seed))
        return y.astype(x.dtype)

    def dropout_backward(
        self,
        dy: Array,
        x: Array,
        W: Array,
        A: Array,
        B: Array,
        scale: float,
        p: float,
        seed: int,
    ) -> tuple[Array, ...]:
        wide = [self.widen(a) for a in (dy, x, W, A, B)]
        drop, lora = self.drop(p, seed), LoRA(wide[3], wide[4], scale, p)
        h = self.ops._rows(self.ops.dropout(wide[1], drop), wide[3].T)
        grads = self.ops.lora_backward(wide[0], wide[1], h, wide[2], lora, drop)
        return tuple(np.asarray(g).astype(x.dtype) for g in grads)

    # ---- merge --------------------------------------------------------------------------------

    def merge(self, W: Array, A: Array, B: Array, scale: float) -> Any:
        """W', or (W', state): the state is what makes unmerge exact."""
        if W.dtype == np.float64:
            merged = W + scale * (B @ A)
            lost = np.flatnonzero(~same_bits(merged - scale * (B @ A), W))
            return merged, (lost, W.reshape(-1)[lost])
        lora, dtype = LoRA(self.widen(A), self.widen(B), scale), self.file_dtype(W)
        merged, residue = self.ops.merge(self.as_bits(W), lora, dtype)
        return merged.view(W.dtype), residue

    def unmerge(self, W: Array, A: Array, B: Array, scale: float, state: Any = None) -> Array:
        if W.dtype == np.float64:
            back: Array = np.ascontiguousarray(W - scale * (B @ A))
            if state is not None:
                back.reshape(-1)[state[0]] = state[1]
            return back
        lora, dtype = LoRA(self.widen(A), self.widen(B), scale), self.file_dtype(W)
        return self.ops.unmerge(self.as_bits(W), lora, state, dtype).view(W.dtype)

    # ---- several adapters ---------------------------------------------------------------------

    def forward_stacked(
        self, x: Array, W: Array, adapters: Sequence[LoraTriple], bias: Array | None = None
    ) -> Array:
        """The base and every adapter's update: their A's and scaled B's as one long adapter."""
        if not adapters:
            return self.base(x, W, bias)
        A = np.concatenate([self.widen(A) for A, _, _ in adapters], axis=0)
        B = np.concatenate(
            [self.widen(B) * self.widen(B).dtype.type(s) for _, B, s in adapters], axis=1
        )
        y, _ = self.ops.lora_forward(
            self.widen(x), self.widen(W), self.widen(bias), LoRA(A, B, 1.0)
        )
        return y.astype(x.dtype)

    def forward_mixed(
        self,
        x: Array,
        W: Array,
        adapters: Sequence[LoraTriple],
        rows: Array,
        bias: Array | None = None,
    ) -> Array:
        y = np.empty((x.shape[0], W.shape[0]), x.dtype)
        for i, mine in by_adapter(rows, len(adapters)).items():
            xi = x[mine]
            y[mine] = self.base(xi, W, bias) if i < 0 else self.forward(xi, W, *adapters[i], bias)
        return y

    def module(self, W: Array, bias: Array | None = None) -> CorrectModule:
        return CorrectModule(self, W, bias)

    # ---- files and plan -----------------------------------------------------------------------

    def save(
        self, directory: str, adapters: Mapping[str, tuple[Array, Array]], config: dict[str, Any]
    ) -> None:
        modules = {p: (B.shape[0], A.shape[1]) for p, (A, B) in adapters.items()}
        lora, plan = self._resolve(config, modules)
        parts = {e.path: LoRA(*adapters[e.path], scale=e.scale) for e in plan}
        Adapter(lora, plan, parts).save(directory)

    def load(self, directory: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, LoraTriple]:
        adapter = Adapter.load(directory, self._specs(modules))
        return {path: (lora.A, lora.B, lora.scale) for path, lora in adapter.items()}

    def plan(
        self, config: dict[str, Any], modules: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[int, float, float]]:
        _, plan = self._resolve(config, modules)
        return {e.path: (e.r, e.alpha, e.scale) for e in plan}

    def _specs(self, modules: Mapping[str, tuple[int, int]]) -> dict[str, ModuleSpec]:
        """The linear ones; what cannot take LoRA is None in the protocol."""
        return {path: ModuleSpec("linear", *s) for path, s in modules.items() if s is not None}

    def _resolve(self, config: dict[str, Any], modules: Mapping[str, tuple[int, int]]) -> Any:
        lora = LoraConfig.from_dict(config)
        return lora, resolve(lora, self._specs(modules))

    def set_num_threads(self, n: int) -> None:
        """NumPy's products of one row have no threads to set."""


def same_bits(a: Array, b: Array) -> Array:
    """Where two float64 arrays agree in each bit."""
    same: Array = np.ascontiguousarray(a).view(np.int64) == np.ascontiguousarray(b).view(np.int64)
    return same


class CorrectModule:
    """One module with an adapter that comes and goes. The base weight is kept aside, never changed:
    merging makes another array, and what unmerging takes out is a copy of what was put in."""

    def __init__(self, maker: Correct, W: Array, bias: Array | None) -> None:
        self.maker, self.W, self.bias = maker, W, bias
        self.lora: LoraTriple | None = None
        self.inside: LoraTriple  # what is merged
        self.merged: Array | None = None
        self.state: Any = None

    def forward(self, x: Array) -> Array:
        if self.merged is not None:
            return self.maker.base(x, self.merged, self.bias)
        if self.lora is None:
            return self.maker.base(x, self.W, self.bias)
        return self.maker.forward(x, self.W, *self.lora, self.bias)

    def attach(self, A: Array, B: Array, scale: float) -> None:
        if self.merged is not None:
            self.unmerge()
        self.lora = A, B, scale

    def detach(self) -> None:
        self.lora = self.merged = self.state = None

    def merge(self) -> None:
        if self.lora is not None and self.merged is None:
            A, B, scale = self.lora
            self.inside = A.copy(), B.copy(), scale
            result = self.maker.merge(self.W, *self.inside)
            self.merged, self.state = result if isinstance(result, tuple) else (result, None)

    def unmerge(self) -> None:
        if self.merged is not None:
            self.W = self.maker.unmerge(self.merged, *self.inside, self.state)
            self.merged = self.state = None

    def weight(self) -> Array:
        return self.W if self.merged is None else self.merged
