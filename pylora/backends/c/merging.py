"""Adapters merged into weights as files store them, and taken out again, on the C core; those with
a magnitude by the reference, whose bits are the same on every machine."""

from __future__ import annotations

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import at, check, ints, lora_struct, stored, want
from pylora.ops.merge import HOST
from pylora.ops.plain import want_writable
from pylora.types import Array, LoRA, Residue


class Merging(Core):
    """`merge`, `merge_in_place` and `unmerge`."""

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[np.ndarray, Residue]:
        code, W = stored("W", W, dtype)
        d, k = W.shape
        if lora.magnitude is not None:
            return HOST.merge(W, lora, dtype)
        low, A, B, _ = lora_struct(lora, None, d, k)
        out, lossy = self.empty(W.shape, W.dtype), np.zeros(d, np.int64)
        void, ld = "void *", W.shape[1]
        rows = at(lossy, "int64_t *")
        status = lib.pylora_merge(code, d, k, at(W, void), ld, low, at(out, void), ld, rows)
        check(status, "merge")
        n = int(lossy.sum())
        position, bits = np.empty(n, np.int64), np.empty(n, np.uint32)
        if n:
            status = lib.pylora_merge_residue(
                code, d, k, at(W, void), ld, at(out, void), ld, low, rows,
                at(position, "int64_t *"), at(bits, "uint32_t *"),
            )  # fmt: skip
            check(status, "merge")
        return out, Residue(position, bits)

    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        code, own = stored("W", W, dtype)
        want_writable(W)
        if lora.magnitude is not None:
            W[...] = HOST.merge(own, lora, dtype)[0]
            return
        d, k = own.shape
        low, A, B, _ = lora_struct(lora, None, d, k)
        to = at(own, "void *")
        check(lib.pylora_merge(code, d, k, to, k, low, to, k, ffi.NULL), "merge_in_place")
        if own is not W:  # it is not contiguous
            W[...] = own

    def unmerge(
        self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32"
    ) -> np.ndarray:
        code, merged = stored("merged", merged, dtype)
        d, k = merged.shape
        if lora.magnitude is not None:
            back: np.ndarray = HOST.unmerge(merged, lora, residue, dtype)
            return back
        low, A, B, _ = lora_struct(lora, None, d, k)
        position = ints("residue.position", residue.position)
        bits = np.ascontiguousarray(residue.bits, np.uint32)
        want("residue.bits", bits, position.shape)
        out = self.empty(merged.shape, merged.dtype)
        status = lib.pylora_unmerge(
            code, d, k, at(merged, "void *"), k, low, position.size,
            at(position, "int64_t *"), at(bits, "uint32_t *"), at(out, "void *"), k,
        )  # fmt: skip
        check(status, "unmerge")
        return out
