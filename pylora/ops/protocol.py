"""What a backend is, for type checkers: the operations of `pylora.reference.Reference` and a few
ways to make arrays. The docstrings there are the specification of every operation here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from pylora.numbers.precision import Stored
from pylora.ops.llama import LlamaOp, LlamaWeights
from pylora.ops.mixture import Choice
from pylora.ops.repeat import Repeated
from pylora.types import (
    AdamW,
    Array,
    Attn,
    Drop,
    LoRA,
    Norm,
    Projection,
    ProjectionGrad,
    Residue,
    Rotation,
    Seqs,
)

# A frozen weight in the backend's own order; has .shape == (d, k), .nbytes and .precision.
Packed = Any


class Backend(Protocol):
    """The operations that layers are built of. No backend knows what a transformer is."""

    name: str
    xp: Any  # the array namespace of its arrays: numpy (or cupy)
    bitwise: bool  # a row's bits do not depend on the rows beside it
    head_rows: int  # rows of logits that a model's loss makes at a time

    # ---- arrays -------------------------------------------------------------------------------
    def computes(self, precision: str) -> str: ...
    def activation_dtype(self, precision: str) -> Any: ...
    def pack(self, W: Array | Stored, precision: str = ...) -> Packed: ...
    def unpack(self, P: Packed) -> Array: ...
    def asarray(self, a: Any) -> Array: ...
    def to_numpy(self, a: Array) -> np.ndarray: ...
    def check_room(self, nbytes: int) -> None: ...
    def place(self, a: Array) -> Array: ...
    def assign(self, a: Array, values: np.ndarray) -> None: ...
    def empty(self, shape: int | tuple[int, ...], dtype: Any = ...) -> Array: ...
    def zeros(self, shape: int | tuple[int, ...], dtype: Any = ...) -> Array: ...

    # ---- LoRA linear --------------------------------------------------------------------------
    def lora_forward(
        self,
        x: Array,
        W: Packed,
        bias: Array | None = None,
        lora: LoRA | None = None,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None]: ...
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
    ) -> tuple[Array | None, Array | None, Array | None]: ...
    def linear_forward(
        self, x: Array, projections: Sequence[Projection]
    ) -> list[tuple[Array, Array | None]]: ...
    def linear_backward(
        self,
        x: Array | None,
        projections: Sequence[ProjectionGrad],
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, list[tuple[Array | None, Array | None]]]: ...

    # ---- DoRA: pylora.ops.dora, where a backend has no better ----------------------------------
    def row_squares(self, W: Packed, columns: bool = False) -> Array: ...
    def row_norms(
        self, W: Packed, lora: LoRA, squares: Array | None = None, columns: bool = False
    ) -> Array: ...
    def dora_forward(
        self,
        x: Array,
        W: Packed,
        bias: Array | None,
        lora: LoRA,
        drop: Drop | None = None,
        residual: Array | None = None,
        dtype: Any = None,
    ) -> tuple[Array, Array | None, Array]: ...
    def dora_backward(
        self,
        dy: Array,
        x: Array | None,
        h: Array | None,
        v: Array,
        W: Packed | None,
        lora: LoRA,
        drop: Drop | None = None,
        *,
        add: Array | None = None,
        need_dx: bool = True,
        dtype: Any = None,
    ) -> tuple[Array | None, Array, Array, Array]: ...

    # ---- merge --------------------------------------------------------------------------------
    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]: ...
    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None: ...
    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array: ...

    # ---- transformer --------------------------------------------------------------------------
    def cast(self, x: Array, dtype: Any = None) -> Array: ...
    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]: ...
    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[Array, Array | None]: ...
    def norm_forward(self, x: Array, norm: Norm, dtype: Any = None) -> tuple[Array, Array]: ...
    def norm_backward(
        self, dy: Array, x: Array, norm: Norm, rstd: Array, add: Array | None = None
    ) -> Array: ...
    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]: ...
    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> Array: ...
    def activation_forward(
        self, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> Array: ...
    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[Array, Array | None]: ...
    def soft_cap_forward(self, x: Array, multiplier: float, cap: float) -> Array: ...
    def soft_cap_backward(self, dy: Array, y: Array, multiplier: float, cap: float) -> Array: ...
    def choose(self, logits: Array, top_k: int, normalize: bool) -> Choice: ...
    def rope(
        self,
        x: Array,
        cos: Array,
        sin: Array,
        position: Array,
        head_dim: int,
        layout: str = "half",
        inverse: bool = False,
        dtype: Any = None,
    ) -> Array: ...
    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]: ...
    def attention_backward(
        self,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        seqs: Seqs,
        attn: Attn,
        dtype: Any = None,
    ) -> tuple[Array, Array, Array]: ...
    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> Array: ...
    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[Array, Array]: ...
    def qkv_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        rotation: Rotation | None = None,
        dtype: Any = None,
    ) -> tuple[list[tuple[Array, Array | None]], Array | None]: ...
    def gate_up_forward(
        self,
        x: Array,
        projections: Sequence[Projection],
        norm: Norm | None = None,
        dtype: Any = None,
        activation: str = "silu",
    ) -> tuple[list[tuple[Array, Array | None]], Array, Array | None]: ...
    def embedding_forward(self, ids: Array, W: Packed) -> Array: ...
    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> Array: ...

    def take_rows(self, x: Array, rows: Array) -> Array: ...
    def put_rows(self, y: Array, rows: Array, x: Array) -> None: ...

    def llama(self, weights: LlamaWeights) -> LlamaOp: ...
    def repeated(self) -> Repeated: ...

    # ---- loss, optimizer, random numbers ------------------------------------------------------
    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]: ...
    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array: ...
    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[Array, Array, Array]: ...
    def adamw_step(self, param: Array, grad: Array, m: Array, v: Array, o: AdamW) -> None: ...
    def adamw_steps(self, updates: Sequence[tuple[Array, Array, Array, Array, AdamW]]) -> None: ...
    def sum_squares(self, x: Array) -> float: ...
    def total_squares(self, arrays: Sequence[Array]) -> float: ...
    def philox(self, seed: int, stream: int, first: int, n: int) -> Array: ...
    def dropout(self, x: Array, drop: Drop | None) -> Array: ...
