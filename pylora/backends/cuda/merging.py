"""Adapters merged into weights as files store them, and taken out again, on the GPU; those with a
magnitude by the reference in host memory, whose bits are the same on every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.backends.cuda.base import Device
from pylora.backends.cuda.marshal import want
from pylora.errors import DtypeError, ShapeError
from pylora.ops.merge import HOST
from pylora.ops.plain import want_writable
from pylora.types import Array, LoRA, Residue

_MERGED = {"f32": (0, np.float32), "bf16": (1, np.uint16), "f16": (2, np.float16)}


class Merging(Device):
    """`merge`, `merge_in_place` and `unmerge`."""

    def merge(self, W: Array, lora: LoRA, dtype: str = "f32") -> tuple[Array, Residue]:
        """Of a weight on the host the results are on the host, too."""
        if lora.magnitude is not None:
            merged, kept = HOST.merge(self.to_numpy(W), self._host(lora), dtype)
            back = self._back(W)
            return back(merged), replace(kept, position=back(kept.position), bits=back(kept.bits))
        code, on_device, back = self._stored("W", W, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        out, lossy = self.xp.empty_like(on_device), self.xp.zeros(d, np.int64)
        void, i64 = "void *", "int64_t *"
        source, merged = to.at(on_device, void), to.at(out, void)
        self.call("merge", code, d, k, source, k, low, merged, k, to.at(lossy, i64))
        first = self.xp.cumsum(lossy) - lossy
        n = int(lossy.sum())
        position, bits = self.xp.empty(n, np.int64), self.xp.empty(n, np.uint32)
        if n:
            self.call(
                "merge_residue", code, d, k, source, k, merged, k, low, to.at(first, i64),
                to.at(position, i64), to.at(bits, "uint32_t *"),
            )  # fmt: skip
        return back(out), Residue(back(position), back(bits))

    def merge_in_place(self, W: Array, lora: LoRA, dtype: str = "f32") -> None:
        want_writable(W)
        if lora.magnitude is not None:
            W[...] = self.merge(W, lora, dtype)[0]
            return
        code, on_device, back = self._stored("W", W, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        weight = to.at(on_device, "void *")
        self.call("merge", code, d, k, weight, k, low, weight, k, self.ffi.NULL)
        if on_device is not W:
            W[...] = back(on_device)

    def unmerge(self, merged: Array, lora: LoRA, residue: Residue, dtype: str = "f32") -> Array:
        if lora.magnitude is not None:
            kept = replace(
                residue,
                position=self.to_numpy(residue.position),
                bits=self.to_numpy(residue.bits),
            )
            host = HOST.unmerge(self.to_numpy(merged), self._host(lora), kept, dtype)
            return self._back(merged)(host)
        code, on_device, back = self._stored("merged", merged, dtype)
        (d, k), to = on_device.shape, self.to
        low, keep = to.lora(self._placed(lora), None, d, k)
        position = self.checked_index("residue position", residue.position, d * k)
        bits = self.xp.asarray(residue.bits)
        if bits.dtype != np.uint32 or bits.shape != position.shape:
            raise ShapeError("residue.bits must be uint32, one for each position")
        out = self.xp.empty_like(on_device)
        self.call(
            "unmerge", code, d, k, to.at(on_device, "void *"), k, low, position.size,
            to.at(position, "int64_t *"), to.at(bits, "uint32_t *"), to.at(out, "void *"), k,
        )  # fmt: skip
        return back(out)

    def _host(self, lora: LoRA) -> LoRA:
        arrays = {name: getattr(lora, name) for name in ("A", "B", "magnitude", "norm")}
        host: dict[str, Any] = {
            name: None if a is None else self.to_numpy(a) for name, a in arrays.items()
        }
        return replace(lora, **host)

    def _back(self, like: Array) -> Callable[[Any], Any]:
        """What brings results of the host to where `like` is."""
        return np.asarray if isinstance(like, np.ndarray) else self.xp.asarray

    def _placed(self, lora: LoRA) -> LoRA:
        return LoRA(self.place(lora.A), self.place(lora.B), lora.scale)

    def _stored(self, name: str, W: Array, dtype: str) -> tuple[int, Array, Callable[[Any], Any]]:
        """(dtype code, contiguous array on the device, how results go back to where W was)."""
        if dtype not in _MERGED:
            raise DtypeError(f"merge: dtype must be one of {', '.join(_MERGED)}, got {dtype!r}")
        code, kind = _MERGED[dtype]
        if getattr(W, "dtype", None) != kind:
            raise DtypeError(f"{name}: stored as {dtype} must be an array of {np.dtype(kind)}")
        want(name, W, (None, None))
        host = isinstance(W, np.ndarray)
        back = self.xp.asnumpy if host else lambda a: a
        return code, self.xp.ascontiguousarray(self.xp.asarray(W)), back
