"""How a GPU stores weights: packing in each precision, reading them back, and rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends.cuda.base import Device
from pylora.backends.cuda.marshal import CODES, DTYPES, F16, F32, Packed
from pylora.errors import UnsupportedError
from pylora.numbers.precision import BF16, QUANTIZED, Stored, check_precision
from pylora.types import Array


class Precision(Device):
    """Weights as the kernels read them."""

    def computes(self, precision: str) -> str:
        if check_precision(precision) in QUANTIZED:
            raise UnsupportedError(
                f"the cuda backend does not compute in {precision}; choose one of "
                "fp32, bf16, fp16, or --backend c"
            )
        return "fp32" if precision == "fp32x3" else precision

    def activation_dtype(self, precision: str) -> Any:
        """The dtype of arrays that only feed products; None: the computation's own."""
        computed = self.computes(precision)
        return None if computed == "fp32" else BF16 if computed == "bf16" else F16

    def pack(self, W: Array | Stored, precision: str = "fp32") -> Packed:
        """W [d, k] as `precision` stores it. A contiguous array of that dtype is taken as it is:
        the caller gives it away."""
        precision = self.computes(precision)
        if isinstance(W, Stored):
            if W.kind == "bf16":
                W = np.ascontiguousarray(W.rows).view(np.uint16).reshape(W.shape)
            else:
                from pylora.numbers.quantize import dequantize

                W = dequantize(W)
        W = self.to.read("W", self.on_device(W), None, None)
        d, k = (int(n) for n in W.shape)
        code, nbytes = CODES[precision], self.lib.pylora_cuda_pack_bytes(CODES[precision], d, k)
        aligned = W.data.ptr % 256 == 0 and W.flags.c_contiguous
        own = aligned and W.dtype == DTYPES[precision]
        data = W if own else self.xp.empty(nbytes, np.uint8)
        struct = self.ffi.new("pylora_packed *")
        self.call("pack", code, self.to.mat(W), self.to.at(data, "void *"), struct)
        return Packed((d, k), precision, data, struct)

    def unpack(self, P: Packed) -> Array:
        own = P.data.view(DTYPES[P.precision]).reshape(-1)[: P.shape[0] * P.shape[1]]
        return self.cast(own.reshape(P.shape), F32).copy()

    def cast(self, x: Array, dtype: Any = None) -> Array:
        x = self.to.read("x", x, None, None)
        if dtype is None or x.dtype == self.dtype_of(dtype):
            return x
        y = self.empty(x.shape, dtype)
        self.call("cast", self.to.mat(x), self.to.mat(y))
        return y
