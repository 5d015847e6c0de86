"""Attention over sequences of several lengths, on the C core."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends._core import lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import F32, attention_structs, mat, read, read_any, read_qkv
from pylora.types import Array, Attn, Seqs


class Attention(Core):
    """`attention_forward` and `attention_backward`."""

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[np.ndarray, np.ndarray]:
        q, k, v = read_qkv(q, k, v, attn)
        o = self.empty(q.shape, F32 if dtype is None else dtype)
        lse = self.empty((q.shape[0], attn.heads))
        s, spec, keep = attention_structs(seqs, attn)
        inputs, outputs = (mat(q), mat(k), mat(v), s, spec), (mat(o), mat(lse))
        self._in_scratch(
            "attention_forward",
            lib.pylora_attention_workspace, (s, spec),
            lib.pylora_attention_forward, (*inputs, *outputs),
        )  # fmt: skip
        return o, lse

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
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        q, k, v = read_qkv(q, k, v, attn)
        do, o = read_any("do", do, *q.shape), read_any("o", o, *q.shape)
        lse = read("lse", lse, q.shape[0], attn.heads)
        kind = F32 if dtype is None else dtype
        # Keys that no sequence uses keep a gradient of zero.
        dq, dk, dv = self.empty(q.shape, kind), self.zeros(k.shape, kind), self.zeros(v.shape, kind)
        s, spec, keep = attention_structs(seqs, attn)
        inputs = *(mat(a) for a in (do, q, k, v, o, lse)), s, spec
        outputs = mat(dq), mat(dk), mat(dv)
        self._in_scratch(
            "attention_backward",
            lib.pylora_attention_workspace, (s, spec),
            lib.pylora_attention_backward, (*inputs, *outputs),
        )  # fmt: skip
        return dq, dk, dv
