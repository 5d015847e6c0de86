"""The frozen token embedding with an optional LoRA: a token's x is its one-hot row.

    y[i] = W[ids[i]] + scale (A[:, ids[i]] Bᵀ + bias_B)          A [r, vocab], B [hidden, r]

So x Aᵀ is a gather and nothing of size [m, vocab] exists. As in PEFT there is no dropout here. The
packed W may be shared with lm_head (tied embeddings); an adapter of one never touches the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from pylora.errors import PlanError
from pylora.model.linear import (
    Grads,
    LoRAGrad,
    add_grad,
    bias_grads,
    check_lora,
    is_packed,
    nonzero,
)
from pylora.numbers.precision import Stored
from pylora.ops.protocol import Backend, Packed
from pylora.types import Array, LoRA, brief


@dataclass(eq=False)
class EmbeddingCache:
    """What backward needs."""

    __repr__ = brief

    ids: Array
    h: Array | None  # [m, r]


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

    def __repr__(self) -> str:
        adapter = "no adapter" if self._lora is None else f"adapter of rank {self._lora.rank}"
        return f"Embedding({self.path}: [{self.vocab}, {self.hidden}], {adapter})"

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

    def forward(self, ids: Array) -> tuple[Array, EmbeddingCache]:
        """ids int64 [m] -> y [m, hidden]."""
        y, lora, ops = self.ops.embedding_forward(ids, self.W), self._lora, self.ops
        if lora is None:
            return y, EmbeddingCache(ids, None)
        h = ops.xp.ascontiguousarray(lora.A[:, ops.xp.asarray(ids)].T)
        scale = h.dtype.type(lora.scale)
        if nonzero(lora.B) and nonzero(lora.A):  # a fresh adapter of an embedding has A = 0
            y, _ = ops.lora_forward(scale * h, ops.pack(lora.B), residual=y)
        if nonzero(lora.bias):
            y = y + scale * lora.bias
        return y, EmbeddingCache(ids, h)

    def backward(self, dy: Array, cache: EmbeddingCache, grads: Grads) -> None:
        """dB = scale dyᵀ h; dA adds scale (dy B) to the columns of the tokens that were seen."""
        lora, ops = self._lora, self.ops
        if lora is None:
            return
        _, _, dB = ops.lora_backward(dy, None, cache.h, None, lora, need_dx=False, need_dA=False)
        g, _, _ = ops.lora_backward(dy, None, None, ops.pack(lora.B))  # dy B
        dA = ops.embedding_backward(cache.ids, g * g.dtype.type(lora.scale), self.vocab).T  # type: ignore[union-attr]
        grad = LoRAGrad(ops.xp.ascontiguousarray(dA), dB, *bias_grads(ops, dy, lora))
        add_grad(grads, self.path, grad)
