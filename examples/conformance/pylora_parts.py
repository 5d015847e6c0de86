"""What pylora_backends.py asks of pylora beside its linear operations: its embedding, its key of
dropout, its optimizer, and attention over a cache, all sequences of a call at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.correct.attending import CorrectDecoder
from pylora.model.embedding import Embedding
from pylora.model.linear import DropKey
from pylora.numbers.precision import QUANTIZED
from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer
from pylora.types import LoRA, Seqs

GROUP = 32  # quantized precisions store weights in groups of so many inputs


class Parts:
    """Methods of the protocol for an adapter that has `ops`, `precision` and Correct's helpers."""

    ops: Any
    precision: str

    # ---- embeddings: pylora.model.embedding ----------------------------------------------------

    def _embedding(self, W: Any, A: Any, B: Any, scale: float) -> Any:
        """pylora's own layer with the adapter; hidden is filled up with zeros to whole groups."""
        more = -W.shape[1] % (GROUP if self.precision in QUANTIZED else 1)
        wide = np.pad(self.widen(W), ((0, 0), (0, more)))
        if more or self.precision in QUANTIZED:
            self._pack(W)  # says what its scales cannot hold
        layer = Embedding("embed", wide, ops=self.ops._ops, precision=self.precision)
        layer.lora = LoRA(self.widen(A), np.pad(self.widen(B), ((0, more), (0, 0))), scale)
        return layer

    def embedding_forward(self, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        y, _ = self._embedding(W, A, B, scale).forward(np.asarray(ids).astype(np.int64))
        return y[:, : W.shape[1]].astype(W.dtype)

    def embedding_backward(self, dy: Any, ids: Any, W: Any, A: Any, B: Any, scale: float) -> Any:
        layer, grads = self._embedding(W, A, B, scale), {}
        _, cache = layer.forward(np.asarray(ids).astype(np.int64))
        wide = self.widen(dy)
        more = layer.hidden - W.shape[1]
        layer.backward(np.pad(wide, ((0, 0), (0, more))), cache, grads)
        found = grads["embed"]
        return found.A.astype(A.dtype), found.B[: W.shape[1]].astype(B.dtype)

    # ---- the mask of a module: pylora.model.linear ---------------------------------------------

    def dropout_mask(
        self, shape: Any, p: float, seed: int, path: str, step: int, row0: int = 0
    ) -> Any:
        """What a layer leaves of ones: with W = 0 and A = B = I."""
        one = np.eye(shape[1], dtype=np.float32)
        lora = LoRA(one, one, 1.0, p)
        drop = DropKey(seed, step, row0).of(path, lora)
        ops = self.ops._ops  # filling up to groups would number the elements otherwise
        packed = ops.pack(np.zeros_like(one))
        y, _ = ops.lora_forward(np.ones(shape, np.float32), packed, None, lora, drop)
        return np.asarray(y) != 0

    # ---- decoding ------------------------------------------------------------------------------

    def decoder(self, weights: Any, shape: Any) -> Any:
        super().decoder(weights, shape)  # type: ignore[misc]  # it looks at the shape
        return AtOnce(self, weights, shape)

    # ---- a step of training: pylora.training.optimizer -----------------------------------------

    def adapter_step(
        self, params: Any, grads: Any, lr: float, weight_decay: float, lora_plus_ratio: float
    ) -> Any:
        if any(p.dtype != np.float32 for p in params.values()):
            raise NotImplementedError("pylora trains float32 arrays")
        config = TrainConfig(
            weight_decay=weight_decay, lora_plus_ratio=lora_plus_ratio, max_grad_norm=None
        )
        mine = {f"m.{name}": np.array(p, order="C") for name, p in params.items()}
        optimizer = Optimizer(self.ops._ops, mine, config)
        given = {f"m.{name}": np.ascontiguousarray(g) for name, g in grads.items()}
        optimizer.update(given, 0.0, 1, lr)
        return {name: mine[f"m.{name}"] for name in params}


class AtOnce(CorrectDecoder):
    """One attention for all runs of a call: the backend finds each one's rows in the cache."""

    def extend(self, x: Any, runs: Any, adapters: Any) -> Any:
        maker, parts, at = self.maker, [], 0
        wide = maker.widen(x)
        width = self.shape.kv_heads * self.shape.head_dim
        q_start, k_start, k_len = [0], [], []
        for (sequence, n), lora in zip(runs, adapters):
            rows = wide[at : at + n]
            position = self.positions(sequence, n)
            q, k, v = (
                maker._project(name, rows, self.weights, lora)[0]
                for name in ("q_proj", "k_proj", "v_proj")
            )
            q = maker._turned(q, position, self.shape)
            k = maker._turned(k, position, self.shape)
            nothing = np.zeros((0, width), k.dtype), np.zeros((0, width), v.dtype)
            old = self.kept.get(sequence, nothing)
            self.kept[sequence] = np.concatenate([old[0], k]), np.concatenate([old[1], v])
            at += n
            if n:
                parts.append((q, sequence, n, lora))
                q_start.append(q_start[-1] + n)
                k_start.append(sum(k_len))
                k_len.append(self.length(sequence))
        if not parts:
            return np.zeros((0, self.weights["o_proj"].shape[0]), x.dtype)
        q = np.concatenate([part[0] for part in parts])
        k = np.concatenate([self.kept[part[1]][0] for part in parts])
        v = np.concatenate([self.kept[part[1]][1] for part in parts])
        seqs = Seqs(*(np.array(a, np.int64) for a in (q_start, k_start, k_len)))
        o, _ = maker.ops.attention_forward(q, k, v, seqs, maker._attn(self.shape))
        y = []
        for (_, _, _, lora), a, b in zip(parts, q_start, q_start[1:]):
            y.append(maker._project("o_proj", np.ascontiguousarray(o[a:b]), self.weights, lora)[0])
        return np.concatenate(y).astype(x.dtype)
