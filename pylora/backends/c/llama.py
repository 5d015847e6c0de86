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
    activation_of,
    at,
    attention_structs,
    check,
    ints,
    layout_of,
    lora_struct,
    mat,
    norm_struct,
    read,
    read_any,
    want,
)
from pylora.numbers.precision import BF16
from pylora.ops.dora import factor, measured
from pylora.ops.features import QKV
from pylora.ops.heads import HEADS
from pylora.ops.llama import LayerWeights, LlamaWeights, Step, bias_of, embedding_bias
from pylora.types import Array, LoRA, Norm

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
        f, a = weights.features, weights.attn
        hidden, count = weights.embedding.shape[1], len(weights.layers)
        self._keep: list[Any] = []  # ffi memory that the struct points to
        table = self._held(ffi.new("pylora_layer[]", max(count, 1)))
        for c, layer, start in zip(table, weights.layers, weights.starts):
            self._layer(c, layer, start)
        model = self._model = ffi.new("pylora_decoder *")
        model.layers, model.layer = count, table
        model.activations = lib.PYLORA_BF16 if weights.dtype == BF16 else lib.PYLORA_F32
        model.attn = {
            "heads": a.heads, "kv_heads": a.kv_heads, "head_dim": a.head_dim, "scale": a.scale,
            "softcap": a.softcap,
        }  # fmt: skip
        model.activation, model.ungated = activation_of(f.activation), not f.gated
        model.parallel, model.fused_gate_up = f.parallel, f.fused_gate_up
        model.fused_qkv = QKV.index(f.fused_qkv)
        model.embedding_multiplier = f.embedding_multiplier
        model.residual_multiplier = f.residual_multiplier
        model.logit_multiplier, model.logit_softcap = f.logit_multiplier, f.logit_softcap
        model.embedding, model.head = weights.embedding.struct, weights.head.struct
        if weights.positions is not None:
            model.positions = weights.positions.struct
        self._norm(model.norm, weights.norm, hidden)
        self._vocab = int(weights.head.shape[0])

    def _held(self, memory: Any) -> Any:
        self._keep.append(memory)
        return memory

    def _norm(self, c: Any, norm: Norm | None, k: int) -> None:
        if norm is not None:
            one, alive = norm_struct(norm, k, lib.PYLORA_F32)
            ffi.memmove(ffi.addressof(c), one, ffi.sizeof("pylora_norm"))
            self._held((one, alive))

    def _layer(self, c: Any, layer: LayerWeights, start: int) -> None:
        w, hidden = self.weights, self.weights.embedding.shape[1]
        a, D = w.attn, w.attn.head_dim
        self._norm(c.input_norm, layer.input_norm, hidden)
        self._norm(c.mid_norm, layer.mid_norm, hidden)
        self._norm(c.after_attention, layer.after_attention, hidden)
        self._norm(c.after_mlp, layer.after_mlp, hidden)
        of = HEADS.index(layer.qk_norm_of)
        self._norm(c.q_norm, layer.q_norm, a.heads * D if of else D)
        self._norm(c.k_norm, layer.k_norm, a.kv_heads * D if of else D)
        c.norm_of, c.window, c.rope, c.module = of, layer.window, layer.rope, start
        c.scale = layer.scale
        if layer.experts is not None:
            mix = layer.experts
            spec = (mix.router.struct, mix.count, mix.top_k, mix.normalize)
            c.experts = self._held(ffi.new("pylora_experts *", spec))
        biases = []
        for W, bias in zip(layer.W, layer.bias, strict=True):
            b = None if bias is None else np.ascontiguousarray(read("bias", bias, W.shape[0]))
            biases.append(at(self._held(b)))
        c.W = self._held(ffi.new("pylora_packed *[]", [W.struct for W in layer.W]))
        c.bias = self._held(ffi.new("float *[]", biases))

    # ---- what is built once -------------------------------------------------------------------

    def adapter(self, modules: Mapping[int, LoRA], embedding: LoRA | None) -> CAdapter:
        w, size = self.weights, self.weights.head_number + 1
        entries, sizes, scaled = [], 0, False
        for number, lora in modules.items():
            W, own = w.module(number)
            d, k = W.shape
            # a rank of 0: a bias alone
            n = lib.pylora_lora_pack_bytes(W.struct.dtype, d, k, lora.rank) if lora.rank else 0
            entries.append((number, lora, W, sizes, bias_of(lora, own)))
            scaled = scaled or lora.magnitude is not None
            sizes += -(-n // _ALIGN) * _ALIGN
        # One block for the whole adapter.
        memory = self._ops.resident.empty((sizes + _ALIGN,), np.uint8)
        first = memory.__array_interface__["data"][0]
        first += -first % _ALIGN
        structs = ffi.new("pylora_lora[]", max(len(entries), 1))
        loras, biases = ffi.new("pylora_lora *[]", size), ffi.new("float *[]", size)
        factors = ffi.new("float *[]", size) if scaled else ffi.NULL
        keep: list[Any] = [memory, structs, loras, biases, factors]
        own_bias, nbytes = False, int(memory.nbytes)
        for c, (number, lora, W, offset, bias) in zip(structs, entries):
            if lora.rank:
                low, A, B, _ = lora_struct(lora, None, *W.shape)
                to = ffi.cast("void *", first + offset)
                check(lib.pylora_lora_pack(W.struct.dtype, *W.shape, low, to), "lora_pack")
                c.r, c.s, c.packed = lora.rank, lora.scale, to
                loras[number] = ffi.addressof(c)
            if lora.magnitude is not None:
                f = np.array(
                    read("magnitude", factor(measured(self._ops, W, lora), np), W.shape[0])
                )
                keep.append(f)
                factors[number] = at(f)
                nbytes += int(f.nbytes)
            if bias is not None:
                bias = np.array(read("bias", bias, W.shape[0]))
                keep.append(bias)
                biases[number], own_bias = at(bias), True
                nbytes += int(bias.nbytes)
        struct = ffi.new("pylora_adapter *")
        struct.lora = loras
        struct.bias = biases if own_bias else ffi.NULL
        struct.factor = factors
        if embedding is not None:
            nbytes += self._embedding(struct, embedding, keep)
        return CAdapter(struct, nbytes, keep)

    def _embedding(self, struct: Any, lora: LoRA, keep: list[Any]) -> int:
        more = 0
        if lora.magnitude is not None:
            f = np.array(read("magnitude", factor(lora, np), self.weights.embedding.shape[1]))
            struct.embedding_factor, more = at(f), int(f.nbytes)
            keep.append(f)
        lora = LoRA(lora.A.copy(), lora.B.copy(), lora.scale, 0.0, lora.bias)
        low, A, B, _ = lora_struct(lora, None, *self.weights.embedding.shape[::-1])
        struct.embedding, nbytes = low, int(A.nbytes) + more
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
        need = lib.pylora_decoder_workspace(model, c)
        ws, ws_bytes = self._scratch.at_least(need)
        status = lib.pylora_decoder_forward(model, cache.struct, c, mat(logits), ws, ws_bytes)
        check(status, "llama")
        return logits

    def _native(self, step: Step) -> tuple[Any, Any, int, Any]:
        """(pylora_decoder, pylora_step, number of outputs, what must stay alive)."""
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
        held_arrays: list[Any] = []
        seqs, _, keep = attention_structs(step.seqs, self.weights.attn)
        adapters = [ffi.NULL if a is None else a.struct for a in step.adapters]
        table = ffi.new("pylora_adapter *[]", adapters)
        c = ffi.new("pylora_step *")
        c.m, c.seqs, c.segments, c.adapter = m, seqs, len(adapters), table
        c.ids, c.position, c.kv_row = at(step.ids, i64), at(step.position, i64), at(step.rows, i64)
        c.seg_start = at(step.start, i64)
        c.outputs, c.output = step.output.shape[0], at(step.output, i64)
        if step.want_normed:
            step.normed = np.empty((c.outputs, self.weights.embedding.shape[1]), np.float32)
            normed = mat(step.normed)
            c.normed = normed
            held_arrays.append((step.normed, normed))
        tables = ffi.new("pylora_rope_table[]", max(len(step.rotations), 1))
        for table_of, r in zip(tables, step.rotations):
            cos = read("cos", r.cos, None, None)
            sin = read("sin", r.sin, *cos.shape)
            table_of.cosines, table_of.sines = mat(cos)[0], mat(sin)[0]
            table_of.layout = layout_of(r.layout)
            rows = ints("rotation.position", r.position, m)
            table_of.position = at(rows, i64)
            held_arrays.append((cos, sin, rows))
        model = ffi.new("pylora_decoder *", self._model[0])  # a step has its own rope tables
        model.ropes, model.rope = len(step.rotations), tables
        held = (arrays, seqs, keep, table, step.adapters, step.rotations, tables, held_arrays)
        return model, c, int(step.output.shape[0]), held
