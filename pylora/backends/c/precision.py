"""How the C core stores weights: packing in each precision, reading them back, and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import Packed, at, check, mat, read, read_any
from pylora.errors import BackendError, ShapeError, UnsupportedError
from pylora.files.mapped import let_go
from pylora.numbers.blocks import BLOCKS
from pylora.numbers.precision import (
    BF16,
    PRECISIONS,
    QUANTIZED,
    Stored,
    check_precision,
    from_bf16,
    weights_of,
)
from pylora.types import Array

_STORES = {  # what a precision makes of a float source
    "fp32": lib.PYLORA_F32,
    "fp32x3": lib.PYLORA_F32X3,
    "bf16": lib.PYLORA_BF16,
    "int8": lib.PYLORA_Q8_0,
    "int4": lib.PYLORA_Q4_1,
    "int8a8": lib.PYLORA_Q8_0_A8,
    "int4a8": lib.PYLORA_Q4_1_A8,
}
_BLOCKS = {kind: int(getattr(lib, f"PYLORA_{kind.upper()}")) for kind in BLOCKS}
# How a packed weight's bytes are called where they are kept in a file (formats/panels.py).
_KINDS = {"f32": lib.PYLORA_F32, "bf16": lib.PYLORA_BF16, "f32x3": lib.PYLORA_F32X3} | _BLOCKS
_KIND_OF = {int(code): kind for kind, code in _KINDS.items()}
_PANEL = int(lib.PYLORA_PANEL)
_PART = 1 << 22  # bytes of a mapped file's blocks that are packed, and let go of, at a time


class Precision(Core):
    """Weights as the kernels read them."""

    def computes(self, precision: str) -> str:
        """The precision that a model of this one has here: "fp32x3" needs bfloat16 tiles (AMX),
        and is strict float32 without them."""
        if check_precision(precision) == "fp16":
            raise UnsupportedError(
                "the c backend does not compute in fp16, which is for GPUs (--backend cuda); "
                f"choose one of {', '.join(p for p in PRECISIONS if p != 'fp16')}"
            )
        if precision == "fp32x3" and ffi.string(lib.pylora_isa()) != b"amx":
            return "fp32"
        return precision

    def activation_dtype(self, precision: str) -> Any:
        """The dtype of arrays that only feed products; None: the computation's own."""
        return BF16 if check_precision(precision) == "bf16" else None

    def pack(self, W: Array | Stored, precision: str = "fp32") -> Packed:
        """W [d, k] in panels of 32 outputs, as `precision` stores it; blocks of a quantized file
        are taken as they are. The copy is the only one the model needs."""
        precision = self.computes(precision)
        if isinstance(W, Stored):
            if W.kind in _BLOCKS and precision in QUANTIZED:
                return self._pack_blocks(W, precision)
            W = self._read_stored(W, precision)
        a = (read_any if precision == "bf16" else read)("W", W, None, None)
        code, (d, k) = _STORES[precision], a.shape
        data, struct = self._room(code, d, k, precision)
        check(lib.pylora_pack(code, mat(a), at(data, "void *"), struct), "pack")
        return Packed((d, k), precision, data, struct)

    def _pack_blocks(self, W: Stored, precision: str) -> Packed:
        """Some panels at a time, after which a mapped file's pages are let go of: else loading
        would take the file's size twice."""
        code, (d, k), rows = _BLOCKS[W.kind], W.shape, np.ascontiguousarray(W.rows)
        if precision != weights_of(precision):
            code += lib.PYLORA_A8
        data, struct = self._room(code, d, k, precision)
        width, panel = rows.shape[1], int(lib.pylora_pack_bytes(code, 1, k))
        step = max(1, _PART // max(width * _PANEL, 1)) * _PANEL
        for i in range(0, max(d, 1), step):
            some, to = rows[i : i + step], data[i // _PANEL * panel :]
            start, n = at(some, "void *"), len(some)
            check(
                lib.pylora_pack_blocks(code, n, k, start, width, at(to, "void *"), struct), "pack"
            )
            let_go(some)
        struct.d, struct.data = d, at(data, "void *")
        return Packed((d, k), precision, data, struct)

    def _room(self, code: int, d: int, k: int, precision: str) -> tuple[np.ndarray, Any]:
        """The buffer of a packed weight, 64-byte aligned, and its struct to be filled in."""
        nbytes = lib.pylora_pack_bytes(code, d, k)
        if nbytes == 0 and d and k:
            if precision in QUANTIZED and k % 32:
                raise ShapeError(
                    f"{precision} stores weights in groups of 32 inputs, and a weight here is "
                    f"[{d}, {k}]; use fp32 or bf16 for this model"
                )
            raise BackendError(f"this build cannot store a weight [{d}, {k}] in {precision}")
        return self._slabs.take(nbytes), ffi.new("pylora_packed *")

    def panels_of(self, P: Packed) -> tuple[str, np.ndarray]:
        """What `adopt` makes the same weight of: the kind of its panels, and their bytes. They are
        the same whichever kernel table is in use."""
        code = int(P.struct.dtype)
        return _KIND_OF[code if code in _KIND_OF else code - lib.PYLORA_A8], P._data

    @staticmethod
    def panel_bytes(kind: str, d: int, k: int) -> int:
        """Bytes of the panels of a weight [d, k]; 0 where there is no such kind or size."""
        return int(lib.pylora_pack_bytes(_KINDS[kind], d, k)) if kind in _KINDS else 0

    def adopt(self, kind: str, data: Array, shape: tuple[int, int], precision: str) -> Packed:
        """Panels that lie somewhere, such as in a mapped file, as a weight: nothing is copied. They
        must be 64-byte aligned, and not change while the weight lives."""
        (d, k), code = shape, _KINDS[kind]
        if self.panel_bytes(kind, d, k) != data.nbytes:
            raise BackendError(
                f"{data.nbytes} bytes are no panels of a weight [{d}, {k}] in {kind}"
            )
        if kind in _BLOCKS and precision != weights_of(precision):
            code += lib.PYLORA_A8
        struct = ffi.new("pylora_packed *")
        check(lib.pylora_packed_at(code, d, k, at(data, "void *"), struct), "adopt")
        return Packed((d, k), precision, data, struct)

    @staticmethod
    def _read_stored(W: Stored, precision: str) -> np.ndarray:
        """The numbers of a stored weight whose blocks this precision does not keep."""
        if W.kind == "bf16":
            bits = np.ascontiguousarray(W.rows).view(BF16)
            return bits if precision == "bf16" else from_bf16(bits)
        from pylora.numbers.quantize import dequantize

        values: np.ndarray = dequantize(W)
        return values

    def unpack(self, P: Packed) -> np.ndarray:
        W = np.empty(P.shape, np.float32)
        check(lib.pylora_unpack(P.struct, mat(W)), "unpack")
        return W

    def cast(self, x: Array, dtype: Any = None) -> np.ndarray:
        x = read_any("x", x, None, None)
        if dtype is None or x.dtype == dtype:
            return np.asarray(x)
        y = self.empty(x.shape, dtype)
        check(lib.pylora_cast(mat(x), mat(y)), "cast")
        return y
