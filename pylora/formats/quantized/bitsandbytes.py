"""bitsandbytes: NF4 and FP4 in blocks, with double quantization or without, and LLM.int8().

    weight                               two codes a byte, the first in the high half
    weight.absmax                        the scale of each block; or, quantized too, codes into
    weight.nested_quant_map              a table of 256, times
    weight.nested_absmax                 the scale of each block of scales, plus an offset
    weight.quant_map                     the 16 numbers, which are always the same
    weight.quant_state.bitsandbytes__nf4 JSON: sizes of blocks, shape, dtype, offset

A value is table[code] x scale in float32, rounded to the dtype that the weight had: the bits of
`bitsandbytes.functional.dequantize_4bit`. Blocks run on from row to row. Of LLM.int8() a value is
code x SCB / 127 of its row, in float32: `int8_vectorwise_dequant`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pylora.errors import FileFormatError, UnsupportedError
from pylora.formats.base import Array
from pylora.formats.quantized.parts import Parts, Spec

STATE = "weight.quant_state.bitsandbytes__"
ENDINGS = (
    f"{STATE}nf4",
    f"{STATE}fp4",
    "weight.nested_quant_map",
    "weight.nested_absmax",
    "weight.quant_map",
    "weight.absmax",
    "weight_format",
    "SCB",
)
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_TABLES = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.array(  # the ninth is 0, not -0
        [
            *(0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4),
            *(0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4),
        ],
        np.float32,
    ),
}  # fmt: skip
_ROW = np.float32(7.874015748698502e-3)  # 1 / 127


def read(parts: Parts) -> Spec:
    """The weight that these tensors are. Raises FileFormatError or UnsupportedError."""
    if "SCB" in parts or "weight_format" in parts:
        return _int8(parts)
    kind = "fp4" if f"{STATE}fp4" in parts else "nf4"
    state = _state(parts, kind)
    d, k = state["shape"]
    block, n = state["blocksize"], d * k
    if 2 * len(parts.bytes("weight")) not in (n, n + n % 2):
        parts.fail("weight", f"has {len(parts.bytes('weight'))} bytes for {n} codes of 4 bits")
    count = -(-n // block)
    nested = "weight.nested_absmax" in parts
    if nested:
        parts.check("weight.absmax", ("u8",), (count,))
        parts.check("weight.nested_quant_map", ("f32",), (256,))
        parts.check("weight.nested_absmax", ("f32",), (-(-count // state["nested_blocksize"]),))
    else:
        parts.check("weight.absmax", ("f32", "f16", "bf16"), (count,))
    if "weight.quant_map" in parts:
        parts.check("weight.quant_map", ("f32",), (16,))
        if not np.abs(parts.array("weight.quant_map") - _TABLES[kind]).max() < 1e-6:
            parts.fail("weight.quant_map", f"is not the table of {kind}")

    def prepare() -> Callable[[int, int, int], Array]:
        codes, scales = parts.bytes("weight"), _scales(parts, state, nested)
        table = _TABLES[kind]
        pairs = np.stack(np.broadcast_arrays(table[:, None], table[None, :]), axis=-1)
        both = np.ascontiguousarray(pairs.reshape(256, 2)).view(np.uint64)[:, 0]

        def rows(_: int, i: int, j: int) -> Array:
            first, last = i * k, j * k  # whole bytes and whole blocks around them
            low, high = first // block * block, min(-(-last // block) * block, n)
            values = both[codes[low // 2 : -(-high // 2)]].view(np.float32)
            whole = values[: (high - low) // block * block].reshape(-1, block)
            whole *= scales[low // block : low // block + len(whole), None]
            rest = values[whole.size :]
            rest *= scales[min(high // block, count - 1)]
            return values[first - low : last - low].reshape(j - i, k)

        return rows

    return Spec((d, k), _DTYPES[state["dtype"]], kind, prepare)


def _scales(parts: Parts, state: Mapping[str, Any], nested: bool) -> Array:
    """float32 [blocks]"""
    if not nested:
        return parts.floats("weight.absmax")
    table, above = parts.floats("weight.nested_quant_map"), parts.floats("weight.nested_absmax")
    scales = table[parts.array("weight.absmax")]
    scales *= np.repeat(above, state["nested_blocksize"])[: len(scales)]
    scales += np.float32(state["nested_offset"])
    if not np.isfinite(scales).all():
        parts.fail("weight.nested_absmax", "makes scales that are infinite; the file is damaged")
    return scales


def _state(parts: Parts, kind: str) -> dict[str, Any]:
    """The JSON of a weight's state, each key checked."""
    ending = STATE + kind
    parts.check(ending, ("u8",))
    raw = parts.bytes(ending)
    if len(raw) > 4096:
        parts.fail(ending, f"has {len(raw)} bytes, too many for a description")
    try:
        state = json.loads(raw.tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        parts.fail(ending, "is not a JSON object")
    if state.get("quant_type") != kind:
        parts.fail(ending, f"says quant_type {state.get('quant_type')!r:.40}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(_size(x) for x in shape):
        parts.fail(ending, f"says shape {shape!r:.80}; expected [out, in]")
    if state.get("dtype") not in _DTYPES:
        parts.fail(ending, f"says dtype {state.get('dtype')!r:.40}")
    if type(state.get("blocksize")) is not int or state["blocksize"] not in _BLOCKS:
        parts.fail(ending, f"says blocksize {state.get('blocksize')!r:.40}")
    if "weight.nested_absmax" in parts:
        block, offset = state.get("nested_blocksize"), state.get("nested_offset")
        if type(block) is not int or not 1 <= block <= 1 << 16:
            parts.fail(ending, f"says nested_blocksize {block!r:.40}")
        if not isinstance(offset, (int, float)) or not abs(offset) < 1e30:
            parts.fail(ending, f"says nested_offset {offset!r:.40}")
        if state.get("nested_dtype", "float32") != "float32":
            parts.fail(ending, f"says nested_dtype {state['nested_dtype']!r:.40}")
    return state


def _size(x: object) -> bool:
    return type(x) is int and 0 < x < 1 << 31


def _int8(parts: Parts) -> Spec:
    parts.check("weight", ("i8",))
    if len(shape := parts.shape("weight")) != 2:
        parts.fail("weight", f"has shape {shape}; expected [out, in]")
    d, k = shape
    parts.check("SCB", ("f32",), (d,), (d, 1))
    if "weight_format" in parts:
        parts.check("weight_format", ("u8",), (), (1,))
        if int(parts.array("weight_format").reshape(-1)[0]):
            file, name = parts.found["weight_format"]
            raise UnsupportedError(
                f"{file.path}: tensor {name[:200]!r} says that the codes lie in the tiles of a "
                "GPU (col32, col_turing or col_ampere); save the model with a bitsandbytes that "
                "writes rows"
            )

    def prepare() -> Callable[[int, int, int], Array]:
        codes, scales = parts.array("weight"), parts.floats("SCB").reshape(d, 1)

        def rows(_: int, i: int, j: int) -> Array:
            values = codes[i:j] * scales[i:j]
            values *= _ROW
            return values

        return rows

    return Spec((d, k), "f32", "llm.int8", prepare)


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """FileFormatError for a configuration that asks for 4 and 8 bits at once."""
    if config.get("load_in_4bit") and config.get("load_in_8bit"):
        raise FileFormatError(
            f"{where}: quantization_config says load_in_4bit and load_in_8bit; one of them is wrong"
        )
