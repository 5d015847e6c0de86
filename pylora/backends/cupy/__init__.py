"""The CuPy backend: the reference operations with xp = cupy, for a GPU without pylora's library.

What runs is `pylora.reference` itself; overridden is only what would be hopeless one row at a time
(products, attention) or would depend on the order of atomics (embedding_backward), what one of
pylora's kernels does in one pass (`kernels`), and where index arrays, which stay in host memory at
the interface, go to the device. It computes in float32 (or float64); of a precision it has the
weights' values, as the numpy backend does.

cupy is imported when the backend is made, never by `import pylora`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pylora.backends.cupy.kernels import Kernels
from pylora.backends.device import DeviceArrays, open_cupy
from pylora.backends.numpy import NumpyBackend
from pylora.errors import DtypeError, ShapeError
from pylora.numbers.precision import BF16, Stored, check_precision
from pylora.ops.features import ACTIVATIONS
from pylora.ops.plain import Plain
from pylora.reference import IGNORE, Reference
from pylora.types import Array, Attn, LoRA, Residue, Seqs

_QUERIES = 1024  # queries whose scores against a sequence's keys exist at a time


class DeviceWeight:
    """A frozen weight [d, k]: the values that its precision keeps, in the device's memory."""

    def __init__(self, values: Array, precision: str) -> None:
        self.values, self.precision = values, precision
        self.shape: tuple[int, int] = values.shape
        self.dtype, self.nbytes = values.dtype, values.nbytes


class CupyBackend(DeviceArrays, Reference):
    """`Reference` over CuPy."""

    name = "cupy"

    def __init__(self) -> None:
        Reference.__init__(self, open_cupy())
        self._host = NumpyBackend()
        self.kernels = Kernels(self.xp)

    # ---- precision ----------------------------------------------------------------------------

    def computes(self, precision: str) -> str:
        return self._host.computes(precision)

    def activation_dtype(self, precision: str) -> Any:
        check_precision(precision)

    def pack(self, W: Array | Stored, precision: str = "fp32") -> DeviceWeight:
        """The values that `precision` keeps of W [d,k], copied to the device if they are not
        there."""
        precision = self.computes(precision)
        if len(W.shape) != 2:
            raise ShapeError(f"a weight to pack must be [d, k], got shape {W.shape}")
        if precision == "fp32" and isinstance(W, self.xp.ndarray):
            return DeviceWeight(self.asarray(W), precision)
        host = W if isinstance(W, Stored) else self.to_numpy(W)
        return DeviceWeight(self.xp.asarray(self._host.pack(host, precision).values), precision)

    def unpack(self, P: DeviceWeight) -> Array:
        return P.values.copy()

    def asarray(self, a: Any) -> Array:
        """A C-contiguous array on the device; DtypeError unless float32 or float64."""
        array = self.xp.ascontiguousarray(self.on_device(a))
        if array.dtype not in (np.float32, np.float64):
            raise DtypeError(
                f"the cupy backend computes in float32 or float64, got {array.dtype}; convert the "
                "array first"
            )
        return array

    # ---- what is not done row by row ----------------------------------------------------------

    def _rows(self, x: Array, M: Array) -> Array:
        return x @ M

    def row_norms(
        self, W: DeviceWeight, lora: LoRA, squares: Array | None = None, columns: bool = False
    ) -> Array:
        return Plain.row_norms(self, W, lora, squares, columns)

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
    ) -> Array:
        position = self.checked_index("position", position, cos.shape[0])
        known = layout in ("half", "interleaved") and 2 * cos.shape[1] == head_dim
        if dtype is None and known and self.kernels.fit(x, cos, sin):
            return self.kernels.rope(x, cos, sin, position, head_dim, layout, inverse)
        return super().rope(x, cos, sin, position, head_dim, layout, inverse, dtype)

    def _scores(self, Q: Array, K: Array, attn: Attn, first: int, keys: int, queries: int) -> Array:
        """Scaled and capped scores [G, H/G, queries, keys], -inf where a query does not see; the
        first query is number `first` of the sequence's last `queries` .. and sees keys up to its
        own."""
        xp = self.xp
        S = Q.dtype.type(attn.scale) * xp.matmul(Q.transpose(1, 2, 0, 3), K.transpose(1, 2, 3, 0))
        S = self.capped(S, attn.softcap)
        seen = first + xp.arange(queries)[:, None]  # the last key that each query sees
        key = xp.arange(keys)[None, :]
        visible = key <= seen
        if attn.window:
            visible = visible & (key > seen - attn.window)
        return xp.where(visible, S, S.dtype.type(-np.inf))

    def _blocks(self, seqs: Seqs) -> list[tuple[slice, slice, int]]:
        """(query rows, key rows, last key that the first of the queries sees), in small pieces."""
        out = []
        for i, (k0, n) in enumerate(zip(seqs.k_start.tolist(), seqs.k_len.tolist())):
            a, b = int(seqs.q_start[i]), int(seqs.q_start[i + 1])
            for start in range(a, b, _QUERIES):
                end = min(b, start + _QUERIES)
                out.append((slice(start, end), slice(k0, k0 + n), n - (b - start)))
        return out

    def attention_forward(
        self, q: Array, k: Array, v: Array, seqs: Seqs, attn: Attn, dtype: Any = None
    ) -> tuple[Array, Array]:
        """The same sums a block of queries at a time."""
        xp = self.xp
        self._check_qkv(q, k, v, attn)
        o, lse = xp.zeros_like(q), xp.zeros((q.shape[0], attn.heads), q.dtype)
        Q, K, V, O = self._heads(attn, q, k, v, o)
        for rows, keys, first in self._blocks(seqs):
            m, n = rows.stop - rows.start, keys.stop - keys.start
            S = self._scores(Q[rows], K[keys], attn, first, n, m)
            top = S.max(axis=-1, keepdims=True)
            E = xp.exp(S - top)
            total = E.sum(axis=-1, keepdims=True)
            part = xp.matmul(E / total, V[keys].transpose(1, 2, 0, 3))
            O[rows] = part.transpose(2, 0, 1, 3)
            lse[rows] = (top + xp.log(total))[..., 0].transpose(2, 0, 1).reshape(m, attn.heads)
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
    ) -> tuple[Array, Array, Array]:
        xp, scale = self.xp, q.dtype.type(attn.scale)
        self._check_qkv(q, k, v, attn)
        dq, dk, dv = xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
        Q, K, V, O, dO, dQ, dK, dV = self._heads(attn, q, k, v, o, do, dq, dk, dv)
        group = attn.heads // attn.kv_heads
        for rows, keys, first in self._blocks(seqs):
            m, n = rows.stop - rows.start, keys.stop - keys.start
            L = lse[rows].reshape(m, attn.kv_heads, group).transpose(1, 2, 0)[..., None]
            S = self._scores(Q[rows], K[keys], attn, first, n, m)
            P = xp.exp(S - L)  # [G, H/G, m, n]
            d = dO[rows].transpose(1, 2, 0, 3)
            dP = xp.matmul(d, V[keys].transpose(1, 2, 3, 0))
            dot = (dO[rows] * O[rows]).sum(axis=-1).transpose(1, 2, 0)[..., None]
            dS = scale * P * (dP - dot)
            if attn.softcap:  # what is not seen is -inf, and has no slope
                t = xp.where(xp.isinf(S), 0, S) / S.dtype.type(attn.softcap)
                dS = dS * (1 - t * t)
            dQ[rows] = xp.matmul(dS, K[keys].transpose(1, 2, 0, 3)).transpose(2, 0, 1, 3)
            down = xp.matmul(dS.transpose(0, 1, 3, 2), Q[rows].transpose(1, 2, 0, 3))
            dK[keys] += down.sum(axis=1).transpose(1, 0, 2)[:, :, None]
            down = xp.matmul(P.transpose(0, 1, 3, 2), d)
            dV[keys] += down.sum(axis=1).transpose(1, 0, 2)[:, :, None]
        return dq, dk, dv

    @staticmethod
    def _check_qkv(q: Array, k: Array, v: Array, attn: Attn) -> None:
        D = attn.head_dim
        if q.shape[1:] != (attn.heads * D,) or k.shape[1:] != (attn.kv_heads * D,):
            raise ShapeError(f"q and k must be rows of heads of {D}, got {q.shape} and {k.shape}")
        if v.shape != k.shape:
            raise ShapeError(f"v must have the shape of k {list(k.shape)}, got {list(v.shape)}")

    # ---- one pass over memory, where pylora's kernels can be compiled -------------------------

    def rms_norm_forward(
        self, x: Array, w: Array, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        if dtype is None and self.kernels.fit(x, w):
            return self.kernels.rms_norm_forward(x, w, eps)
        return super().rms_norm_forward(x, w, eps, dtype)

    def rms_norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array,
        rstd: Array,
        add: Array | None = None,
        need_dw: bool = False,
    ) -> tuple[Array, Array | None]:
        arrays = (dy, x, w, rstd) if add is None else (dy, x, w, rstd, add)
        if not need_dw and self.kernels.fit(*arrays):
            return self.kernels.rms_norm_backward(dy, x, w, rstd, add), None
        return super().rms_norm_backward(dy, x, w, rstd, add, need_dw)

    def swiglu_forward(self, gate: Array, up: Array, dtype: Any = None) -> Array:
        if dtype is None and self.kernels.fit(gate, up):
            return self.kernels.swiglu_forward(gate, up)
        return super().swiglu_forward(gate, up, dtype)

    def swiglu_backward(
        self, dy: Array, gate: Array, up: Array, dtype: Any = None
    ) -> tuple[Array, Array]:
        if dtype is None and self.kernels.fit(dy, gate, up):
            return self.kernels.swiglu_backward(dy, gate, up)
        return super().swiglu_backward(dy, gate, up, dtype)

    def layer_norm_forward(
        self, x: Array, w: Array, b: Array | None, eps: float, dtype: Any = None
    ) -> tuple[Array, Array]:
        arrays = (x, w) if b is None else (x, w, b)
        if dtype is None and self.kernels.fit(*arrays):
            return self.kernels.layer_norm_forward(x, w, b, eps)
        return super().layer_norm_forward(x, w, b, eps, dtype)

    def layer_norm_backward(
        self, dy: Array, x: Array, w: Array, rstd: Array, add: Array | None = None
    ) -> Array:
        arrays = (dy, x, w, rstd) if add is None else (dy, x, w, rstd, add)
        if self.kernels.fit(*arrays):
            return self.kernels.layer_norm_backward(dy, x, w, rstd, add)
        return super().layer_norm_backward(dy, x, w, rstd, add)

    def activation_forward(self, x: Array, up: Array | None, kind: str, dtype: Any = None) -> Array:
        arrays = (x,) if up is None else (x, up)
        if dtype is None and kind in ACTIVATIONS and self.kernels.fit(*arrays):
            return self.kernels.activation_forward(ACTIVATIONS.index(kind), x, up)
        return super().activation_forward(x, up, kind, dtype)

    def activation_backward(
        self, dy: Array, x: Array, up: Array | None, kind: str, dtype: Any = None
    ) -> tuple[Array, Array | None]:
        arrays = (dy, x) if up is None else (dy, x, up)
        if dtype is None and kind in ACTIVATIONS and self.kernels.fit(*arrays):
            return self.kernels.activation_backward(ACTIVATIONS.index(kind), dy, x, up)
        return super().activation_backward(dy, x, up, kind, dtype)

    # ---- index arrays -------------------------------------------------------------------------

    def embedding_forward(self, ids: Array, W: DeviceWeight) -> Array:
        return W.values[self.checked_index("token id", ids, W.shape[0])]

    def embedding_backward(self, ids: Array, dy: Array, rows: int) -> Array:
        """Each id's rows are added in their order: first all first occurrences, then the second
        ones, and so on. Atomics, which add.at has, keep no order."""
        ids = self.to_numpy(self.checked_index("token id", ids, rows))
        dW = self.xp.zeros((rows, dy.shape[1]), dy.dtype)
        order = np.argsort(ids, kind="stable")
        new = np.concatenate([[True], np.diff(ids[order]) != 0])[: ids.size]
        first = np.maximum.accumulate(np.where(new, np.arange(ids.size), 0))
        turn = np.arange(ids.size) - first  # how many of the same id came before
        for t in range(int(turn.max(initial=-1)) + 1):
            some = self.index(order[turn == t])
            at = self.index(ids[order[turn == t]])
            dW[at] = dW[at] + dy[some]
        return dW

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        labels = self._labels(labels, logits)
        if self.kernels.fit(logits):
            return self.kernels.cross_entropy_forward(logits, labels)
        return super().cross_entropy_forward(logits, labels)

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array:
        weight, labels = self.place(weight), self._labels(labels, logits)
        if overwrite and self.kernels.fit(logits, lse, weight):
            return self.kernels.cross_entropy_backward(logits, labels, lse, weight)
        return super().cross_entropy_backward(logits, labels, lse, weight, overwrite)

    def _labels(self, labels: Array, logits: Array) -> Array:
        """int64 [m] on the device, each a column of the logits or IGNORE."""
        self.checked_index("label", labels[labels != IGNORE], logits.shape[1])
        return self.index(labels)

    # ---- merge: of files, so in host memory ---------------------------------------------------

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]:
        """On the host, where the file's weights are: the same bits as everywhere, and float64 to
        float16 is rounded once there."""
        merged, residue = _merging().merge(self._stored(W), self._on_host(lora), dtype)
        return merged, residue

    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        if isinstance(W, np.ndarray):
            super().merge_in_place(W, lora, dtype)
        else:
            W[...] = self.xp.asarray(self.merge(W, lora, dtype)[0])

    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array:
        lora = self._on_host(lora)
        return _merging().unmerge(self._stored(merged), lora, residue, dtype)

    def _stored(self, W: Array) -> np.ndarray:
        """In host memory, as a file has it: bfloat16 as uint16."""
        host = self.to_numpy(W)
        return host.view(np.uint16) if host.dtype == BF16 else host

    def _on_host(self, lora: LoRA) -> LoRA:
        arrays: dict[str, Any] = {n: getattr(lora, n) for n in ("A", "B", "magnitude", "norm")}
        host: dict[str, Any] = {
            n: None if a is None else self.to_numpy(a) for n, a in arrays.items()
        }
        return replace(lora, **host)


def _merging() -> Any:
    from pylora import backends

    return backends.host()
