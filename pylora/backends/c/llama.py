"""The operation `llama` on the C core: the structs of csrc/pylora.h, built once and kept.

A step of one token costs as much as reading the weights once, a few milliseconds; so what Python
does for it must be some tens of microseconds. The model's struct is built with the model, the
cache's with the cache, the step's when its arrays change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.marshal import (
    Packed,
    Scratch,
    at,
    attention_structs,
    check,
    lora_struct,
    mat,
    read,
    read_any,
    want,
)
from pylora.numbers.precision import BF16
from pylora.ops.llama import LlamaWeights, Step, bias_of, embedding_bias
from pylora.types import Array, LoRA, Norm

_MODULES = lib.PYLORA_LAYER_MODULES
_ALIGN = 64


class CAdapter:
    """An adapter packed for the weights of one model, with everything that its struct points to."""

    def __init__(self, struct: Any, nbytes: int, keep: Any) -> None:
        self.struct, self.nbytes, self._keep = struct, nbytes, keep


class CCache:
    """Pointers to the keys and values of each layer."""

    def __init__(self, struct: Any, keep: Any) -> None:
        self.struct, self._keep = struct, keep


class CLlama:
    """`LlamaOp` on the C core."""

    def __init__(self, weights: LlamaWeights, ops: Any, scratch: Scratch) -> None:
        self.weights, self._ops, self._scratch = weights, ops, scratch
        keep: list[Any] = []  # ffi memory that the struct points to

        def vector(a: Array | None, n: int | None = None) -> Any:
            if a is None:
                return ffi.NULL
            a = np.ascontiguousarray(read("weight", a, n))
            keep.append(a)
            return at(a)

        def weight(norm: Norm | None) -> Array | None:
            return None if norm is None else norm.w

        hidden, layers = weights.embedding.shape[1], len(weights.layers)
        table = ffi.new("pylora_layer[]", max(layers, 1))
        for c, layer in zip(table, weights.layers):
            c.input_norm = vector(weight(layer.input_norm), hidden)
            c.mid_norm = vector(weight(layer.mid_norm), hidden)
            c.q_norm, c.k_norm = vector(weight(layer.q_norm)), vector(weight(layer.k_norm))
            c.window = layer.window
            for i, (W, bias) in enumerate(zip(layer.W, layer.bias, strict=True)):
                c.W[i], c.bias[i] = W.struct, vector(bias, W.shape[0])
        model = ffi.new("pylora_llama *")
        a = weights.attn
        model.layers = layers
        model.activations = lib.PYLORA_BF16 if weights.dtype == BF16 else lib.PYLORA_F32
        model.attn = {
            "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "scale": a.scale,
        }  # fmt: skip
        model.eps, model.rope_layout = weights.eps, lib.PYLORA_ROPE_HALF
        model.embedding, model.head = weights.embedding.struct, weights.head.struct
        model.norm, model.layer = vector(weights.norm.w, hidden), table
        self._model, self._keep = model, (keep, table)
        self._vocab = int(weights.head.shape[0])

    # ---- what is built once -------------------------------------------------------------------

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> CAdapter:
        w, size = self.weights, self.weights.head_number + 1
        entries, sizes = [], 0
        for number, lora in modules.items():
            W, own = w.module(number)
            d, k = W.shape
            # a rank of 0: a bias alone
            n = lib.pylora_lora_pack_bytes(W.struct.dtype, d, k, lora.rank) if lora.rank else 0
            entries.append((number, lora, W, sizes, bias_of(lora, own)))
            sizes += -(-n // _ALIGN) * _ALIGN
        # One block for the whole adapter.
        memory = self._ops.resident.empty((sizes + _ALIGN,), np.uint8)
        first = memory.__array_interface__["data"][0]
        first += -first % _ALIGN
        structs = ffi.new("pylora_lora[]", max(len(entries), 1))
        loras, biases = ffi.new("pylora_lora *[]", size), ffi.new("float *[]", size)
        keep: list[Any] = [memory, structs, loras, biases]
        own_bias, nbytes = False, int(memory.nbytes)
        for c, (number, lora, W, offset, bias) in zip(structs, entries):
            if lora.rank:
                low, A, B, _ = lora_struct(lora, None, *W.shape)
                to = ffi.cast("void *", first + offset)
                check(lib.pylora_lora_pack(W.struct.dtype, *W.shape, low, to), "lora_pack")
                c.r, c.s, c.packed = lora.rank, lora.scale, to
                loras[number] = ffi.addressof(c)
            if bias is not None:
                bias = np.array(read("bias", bias, W.shape[0]))
                keep.append(bias)
                biases[number], own_bias = at(bias), True
                nbytes += int(bias.nbytes)
        struct = ffi.new("pylora_adapter *")
        struct.lora = loras
        struct.bias = biases if own_bias else ffi.NULL
        if embedding is not None:
            nbytes += self._embedding(struct, embedding, keep)
        return CAdapter(struct, nbytes, keep)

    def _embedding(self, struct: Any, lora: LoRA, keep: list[Any]) -> int:
        lora = LoRA(lora.A.copy(), lora.B.copy(), lora.scale, 0.0, lora.bias)
        low, A, B, _ = lora_struct(lora, None, *self.weights.embedding.shape[::-1])
        struct.embedding, nbytes = low, int(A.nbytes)
        keep += [low, A, B]
        if lora.rank and A.any() and B.any():
            packed: Packed = self._ops.pack(B)
            struct.embedding_B = packed.struct
            keep.append(packed)
            nbytes += packed.nbytes
        bias = embedding_bias(lora)
        if bias is not None:
            struct.embedding_bias = at(bias)
            keep.append(bias)
            nbytes += int(bias.nbytes)
        return nbytes

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> CCache:
        both = []
        for arrays in (k, v):
            mats = ffi.new("pylora_mat[]", max(len(arrays), 1))
            for c, a in zip(mats, arrays):
                c_mat = mat(read_any("KV cache", a, None, None))
                ffi.memmove(ffi.addressof(c), c_mat, ffi.sizeof("pylora_mat"))
            both.append(mats)
        return CCache(ffi.new("pylora_kv *", both), (both, tuple(k), tuple(v)))

    # ---- a step -------------------------------------------------------------------------------

    def forward(self, cache: CCache, step: Step) -> np.ndarray:
        if step.native is None:
            step.native = self._native(step)
        model, c, n, _ = step.native
        logits: np.ndarray = self._ops.empty((n, self._vocab))
        need = lib.pylora_llama_workspace(model, c)
        ws, ws_bytes = self._scratch.at_least(need)
        status = lib.pylora_llama_forward(model, cache.struct, c, mat(logits), ws, ws_bytes)
        check(status, "llama")
        return logits

    def _native(self, step: Step) -> tuple[Any, Any, int, Any]:
        """(pylora_llama, pylora_step, number of outputs, what must stay alive)."""
        m, i64 = step.ids.shape[0], "int64_t *"
        arrays = (step.ids, step.position, step.rows, step.output, step.start)
        for name, a, n in zip(
            ("ids", "position", "rows", "output", "start"),
            arrays,
            (m, m, m, None, len(step.adapters) + 1),
        ):
            if a.dtype != np.int64 or not a.flags.c_contiguous:
                raise TypeError(f"step.{name} must be a contiguous int64 array")
            want(f"step.{name}", a, (n,))
        seqs, _, keep = attention_structs(step.seqs, self.weights.attn)
        adapters = [ffi.NULL if a is None else a.struct for a in step.adapters]
        table = ffi.new("pylora_adapter *[]", adapters)
        c = ffi.new("pylora_step *")
        c.m, c.seqs, c.segments, c.adapter = m, seqs, len(adapters), table
        c.ids, c.position, c.kv_row = at(step.ids, i64), at(step.position, i64), at(step.rows, i64)
        c.seg_start = at(step.start, i64)
        c.outputs, c.output = step.output.shape[0], at(step.output, i64)
        model = ffi.new("pylora_llama *", self._model[0])  # a step has its own rope tables
        model.cosines, model.sines = mat(step.cos)[0], mat(step.sin)[0]
        held = (arrays, seqs, keep, table, step.adapters, step.rotations)
        return model, c, int(step.output.shape[0]), held
