"""Attention over sequences of several lengths, on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends.cuda.marshal import F32, PlacedSeqs, check_seqs, longest
from pylora.backends.cuda.precision import Precision
from pylora.types import Array, Attn, Seqs


class Attention(Precision):
    """`attention_forward` and `attention_backward`."""

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        q, k, v = self.read_qkv(q, k, v, attn)
        o = self.empty(q.shape, F32 if dtype is None else dtype)
        lse = self.empty((q.shape[0], attn.heads))
        s, keep = self._seqs(seqs, q.shape[0], k.shape[0])
        self.attend(q, k, v, s, attn, o, lse)
        return o, lse

    def attend(
        self, q: Array, k: Array, v: Array, seqs: Any, attn: Attn, o: Array, lse: Array
    ) -> None:
        """`attention_forward` of checked arrays, with a pylora_cuda_seqs."""
        to, spec = self.to, self.to.attn(attn)
        need = self.lib.pylora_cuda_attention_workspace(
            self.context, seqs, spec, q.shape[0], k.shape[0]
        )
        self.call(
            "attention_forward", to.mat(q), to.mat(k), to.mat(v), seqs, spec, to.mat(o),
            to.mat(lse), *self.workspace(need),
        )  # fmt: skip

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
    ) -> tuple[Array, Array, Array]:
        to = self.to
        q, k, v = self.read_qkv(q, k, v, attn)
        do, o = to.read("do", do, *q.shape), to.read("o", o, *q.shape)
        lse = to.read("lse", lse, q.shape[0], attn.heads, narrow=False)
        kind = F32 if dtype is None else dtype
        s, keep = self._seqs(seqs, q.shape[0], k.shape[0])
        # Keys that no sequence uses keep a gradient of zero.
        whole = int(np.asarray(seqs.k_len).sum()) >= k.shape[0]
        make = self.empty if whole else self.zeros
        dq = (self.empty if int(seqs.q_start[-1]) >= q.shape[0] else self.zeros)(q.shape, kind)
        dk, dv = make(k.shape, kind), make(v.shape, kind)
        spec = to.attn(attn)
        need = self.lib.pylora_cuda_attention_workspace(
            self.context, s, spec, q.shape[0], k.shape[0]
        )
        self.call(
            "attention_backward", *(to.mat(a) for a in (do, q, k, v, o, lse)), s, spec,
            *(to.mat(a) for a in (dq, dk, dv)), *self.workspace(need),
        )  # fmt: skip
        return dq, dk, dv

    def read_qkv(self, q: Array, k: Array, v: Array, attn: Attn) -> tuple[Array, Array, Array]:
        """Checked, and of one type: the narrowest that holds all of them is float32."""
        k = self.to.read("k", k, None, attn.kv_heads * attn.head_dim)
        q = self.to.read("q", q, None, attn.heads * attn.head_dim)
        v = self.to.read("v", v, *k.shape)
        if len({a.dtype for a in (q, k, v)}) > 1:
            q, k, v = (self.cast(a, F32) for a in (q, k, v))
        return q, k, v

    def _seqs(self, seqs: Seqs, q_rows: int, k_rows: int) -> tuple[Any, Any]:
        """(pylora_cuda_seqs, what must stay alive), copied to the device."""
        if isinstance(seqs, PlacedSeqs) and int(seqs.q_start[-1]) <= min(q_rows, k_rows):
            return seqs.struct, seqs
        check_seqs(seqs, q_rows, k_rows)
        parts = [np.asarray(a, np.int64) for a in (seqs.q_start, seqs.k_start, seqs.k_len)]
        ints = self.xp.asarray(np.concatenate(parts))
        return self.to.seqs(parts[1].size, ints, *longest(seqs)), ints
