"""How precisely a model is computed: the names of the precisions, and bfloat16 in NumPy.

    fp32     float32 throughout
    fp32x3   float32 weights and activations as two bfloat16 halves each: three products for one
    bf16     weights and what feeds a product in bfloat16; sums and the residual stream in float32
    fp16     the same with float16: on GPUs alone
    int8     weights in ggml's Q8_0, or in the blocks of a GGUF file; activations in float32
    int4     weights in ggml's Q4_1, or in the blocks of a GGUF file; activations in float32
    int8a8, int4a8   the same weights; what a product with one takes is rounded to 8 bits, not to 16

A precision says what a frozen weight keeps of its source and what a product rounds (csrc/pylora.h,
pylora_packed, has the rules). Adapters, their gradients and the optimizer are float32 in each.
NumPy has no bfloat16, so arrays of it have the dtype `BF16`: its bits in a field of that name,
which nothing can take for integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pylora.errors import ConfigError, DtypeError
from pylora.numbers.blocks import BLOCKS
from pylora.types import Array, brief

PRECISIONS = ("fp32", "fp32x3", "bf16", "fp16", "int8", "int4", "int8a8", "int4a8")
QUANTIZED = ("int8", "int4", "int8a8", "int4a8")
AUTO = "auto"  # what trains fastest on the machine: see `fastest`

# What 8-bit activations make the logits of SmolLM2-135M-Instruct be off by (its Q4_1 file, 192
# tokens of English; relative, root mean square, against fp32). Of Gemma 3 270M and Qwen2.5-0.5B in
# Q4_K_M it is 0.06 and 0.027. With 16 bits it is 1.5e-4.
A8_ERROR = 0.02

BF16 = np.dtype([("bf16", "<u2")], align=True)

STORED_KINDS = (*BLOCKS, "bf16")


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight as a file stores it: rows of ggml blocks, or of bfloat16 numbers."""

    __repr__ = brief

    kind: str  # one of STORED_KINDS
    rows: np.ndarray  # uint8 [d, bytes of a row]
    shape: tuple[int, int]  # (d, k)

    def __post_init__(self) -> None:
        if self.kind not in STORED_KINDS:
            raise DtypeError(
                f"a stored weight of kind {self.kind!r}; it must be one of "
                f"{', '.join(STORED_KINDS)}"
            )


def check_precision(precision: str) -> str:
    """The name itself; ConfigError, listing them all, if it is none."""
    if precision not in PRECISIONS:
        raise ConfigError(
            f"there is no precision {precision!r}; choose one of {', '.join(PRECISIONS)}"
        )
    return precision


def check_choice(precision: str | None) -> str | None:
    """As `check_precision`; "auto" is allowed, too, and None, which is what the model suggests."""
    return precision if precision in (AUTO, None) else check_precision(precision)


def fastest(backend: str, isa: str | None) -> str:
    """What "auto" stands for: bf16 where the processor multiplies bfloat16 numbers, and on GPUs;
    else fp32. Without such products bf16 trains no faster than fp32 (docs/performance.md)."""
    products = backend == "c" and isa in ("amx", "avx512bf16")
    return "bf16" if products or backend == "cuda" else "fp32"


def weights_of(precision: str) -> str:
    """The precision that stores weights alike, and rounds no activations to 8 bits."""
    return precision.removesuffix("a8")


def describe(precision: str, computes: str) -> str:
    """The precision asked for, and what a backend makes of it where that is another one."""
    if precision == computes and precision != weights_of(precision):
        return (
            f"{precision} (activations in 8 bits: logits off by {100 * A8_ERROR:.2g} % and more, "
            f"{weights_of(precision)} by 0.015 %)"
        )
    if precision == computes:
        return precision
    return f"{precision}, computed as strict {computes}: this machine has no bfloat16 tiles (AMX)"


def to_bf16(x: Array) -> np.ndarray:
    """`x` rounded to the nearest bfloat16, ties to even, as an array of BF16. NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    # Adding 0x7fff plus the lowest kept bit carries into the kept half exactly when rounding up.
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    kept = np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return np.asarray(kept.reshape(np.shape(x))).view(BF16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """The float32 values of an array of BF16, exactly."""
    bits = np.ascontiguousarray(x).view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32).reshape(x.shape)


def widened(x: Array) -> Array:
    """float32 values of an array of BF16; any other array as it is."""
    return from_bf16(x) if x.dtype == BF16 else x


def as_dtype(x: Array, dtype: np.dtype | type | None) -> Array:
    """`x` rounded to `dtype`, which may be BF16; None leaves it as it is."""
    if dtype is None or x.dtype == dtype:
        return x
    return to_bf16(x) if dtype == BF16 else x.astype(dtype, copy=False)
