"""The token embedding with an optional LoRA: a token's x is its one-hot row.

    y[i] = W[ids[i]] + scale (A[:, ids[i]] Bᵀ + bias_B)          A [r, vocab], B [hidden, r]

With a magnitude (DoRA, [hidden]) each column of W + scale (B A)ᵀ is brought to that length, which
multiplies y by magnitude / norm. So x Aᵀ is a gather and nothing of size [m, vocab] exists. As in
PEFT there is no dropout here. The packed W may be shared with lm_head (tied embeddings); an adapter
of one never touches the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pylora.errors import PlanError
from pylora.model.linear import (
    Grads,
    LoRAGrad,
    Own,
    add_grad,
    bias_grads,
    check_lora,
    is_packed,
    nonzero,
)
from pylora.numbers.precision import Stored
from pylora.ops.dora import factor, magnitude_grad
from pylora.ops.protocol import Backend, Packed
from pylora.types import Array, LoRA, brief


@dataclass(eq=False)
class EmbeddingCache:
    """What backward needs."""

    __repr__ = brief

    ids: Array
    h: Array | None  # [m, r]
    v: Array | None = None  # [m, hidden], with a magnitude: what was rescaled
    lora: LoRA | None = None  # with a magnitude: the adapter with its lengths


class Embedding:
    """Rows of W [vocab, hidden], with an optional adapter in `.lora`."""

    def __init__(
        self,
        path: str,
        W: Array | Stored | Packed,
        *,
        ops: Backend,
        precision: str = "fp32",
    ) -> None:
        self.path, self.ops = path, ops
        self.W: Packed = W if is_packed(W) else ops.pack(W, precision)
        self.vocab, self.hidden = (int(n) for n in self.W.shape)
        self._lora: LoRA | None = None
        self.own: Own | None = None  # what of W is trained
        self._squares: Array | None = None  # of W's columns, once a magnitude asked for them

    def __repr__(self) -> str:
        adapter = "no adapter" if self._lora is None else f"adapter of rank {self._lora.rank}"
        return f"Embedding({self.path}: [{self.vocab}, {self.hidden}], {adapter})"

    @property
    def trained(self) -> bool:
        """Whether backward has a gradient to compute here."""
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
        check_lora(self.path, lora, self.hidden, self.vocab)
        if lora.base_bias is not None:
            raise PlanError(f"{self.path}: an embedding has no bias that base_bias could replace")

    def measured(self, lora: LoRA) -> LoRA:
        """The adapter with `norm`, the lengths of the columns of W + scale (B A)ᵀ as they are now;
        itself where it has no magnitude, or was given lengths to go by."""
        if lora.magnitude is None or lora.norm is not None:
            return lora
        if self._squares is None:
            self._squares = self.ops.row_squares(self.W, columns=True)
        return replace(lora, norm=self.ops.row_norms(self.W, lora, self._squares, columns=True))

    def forward(self, ids: Array) -> tuple[Array, EmbeddingCache]:
        """ids int64 [m] -> y [m, hidden]."""
        y, lora, ops = self.ops.embedding_forward(ids, self.W), self._lora, self.ops
        if lora is None:
            return y, EmbeddingCache(ids, None)
        h = ops.xp.ascontiguousarray(lora.A[:, ops.xp.asarray(ids)].T)
        scale = h.dtype.type(lora.scale)
        if nonzero(lora.B) and nonzero(lora.A):  # a fresh adapter of an embedding has A = 0
            y, _ = ops.lora_forward(scale * h, ops.pack(lora.B), residual=y)
        if lora.magnitude is not None:
            lora = self.measured(lora)
            return y * factor(lora, ops.xp), EmbeddingCache(ids, h, y, lora)
        if nonzero(lora.bias):
            y = y + scale * lora.bias
        return y, EmbeddingCache(ids, h)

    def backward(self, dy: Array, cache: EmbeddingCache, grads: Grads) -> None:
        """dB = scale dyᵀ h; dA adds scale (dy B) to the columns of the tokens that were seen; dW
        adds dy to their rows."""
        lora, ops, dm = self._lora, self.ops, None
        if self.own is not None:
            self.own.add_rows(ops, grads, cache.ids, dy, self.vocab)
        if lora is None:
            return
        if cache.lora is not None:
            dm = magnitude_grad(dy, cache.v, cache.lora, ops.xp)
            dy = dy * factor(cache.lora, ops.xp)
        _, _, dB = ops.lora_backward(dy, None, cache.h, None, lora, need_dx=False, need_dA=False)
        g, _, _ = ops.lora_backward(dy, None, None, ops.pack(lora.B))  # dy B
        dA = ops.embedding_backward(cache.ids, g * g.dtype.type(lora.scale), self.vocab).T  # type: ignore[union-attr]
        grad = LoRAGrad(ops.xp.ascontiguousarray(dA), dB, *bias_grads(ops, dy, lora), dm)
        add_grad(grads, self.path, grad)
