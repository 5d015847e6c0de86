"""compressed-tensors (llm-compressor's): weights of 8 bits, floats or integers, and of 4 packed.

    float-quantized, naive-quantized   weight F8_E4M3, weight_scale of a tensor, row, group or block
    int-quantized, naive-quantized     weight I8, weight_scale, weight_zero_point
    pack-quantized                     weight_packed I32 [out, in x bits / 32], numbers of 4 or 8
                                       bits plus half their range; weight_shape; weight_zero_point
                                       packed along the outputs; weight_g_idx

A value is (code - zero) x scale, rounded to the dtype of the scales: the bits of the library's
`dequantize`. Scales of activations and of the cache are for engines that round those; nothing here
does. Sparse weights, and floats of 4 and 6 bits (nvfp4, mxfp4, mxfp6, mxfp8), are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.errors import UnsupportedError
from pylora.formats.base import Array
from pylora.formats.quantized.fp8 import VALUES, grid, spread
from pylora.formats.quantized.packed import unpack, words_for
from pylora.formats.quantized.parts import FLOATS, Parts, Spec

ENDINGS = (
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
)
FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
_BITS = (4, 8)


@dataclass(frozen=True)
class Group:
    """How the weights of one of config_groups are stored."""

    form: str
    bits: int
    kind: str  # "int" or "float"
    block: tuple[int, int] | None  # what one scale is for; None: a row or the tensor


def check_config(where: str, config: Mapping[str, Any]) -> list[Group]:
    """The settings of each group's weights; UnsupportedError, by name, for what is not read."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedError(f"{where}: quantization_config has no config_groups")
    if config.get("quantization_status") not in (None, "compressed"):
        raise UnsupportedError(
            f"{where}: quantization_config's quantization_status is "
            f"{config['quantization_status']!r:.60}; only 'compressed' is read"
        )
    sparse = config.get("sparsity_config")
    if isinstance(sparse, Mapping) and sparse.get("format") not in (None, "dense"):
        raise UnsupportedError(
            f"{where}: quantization_config's sparsity_config is {sparse.get('format')!r:.60}, "
            "which is not read"
        )
    if config.get("transform_config"):
        raise UnsupportedError(f"{where}: quantization_config's transform_config is not read")
    out = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise UnsupportedError(f"{where}: config_groups[{name[:60]!r}] has no weights")
        form = group.get("format") or config.get("format")
        if form not in FORMATS:
            raise UnsupportedError(
                f"{where}: compressed-tensors' format {form!r:.60} is not read; only "
                f"{', '.join(FORMATS)}"
            )
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        sizes = _BITS if form == "pack-quantized" else (8,)
        if kind not in ("int", "float") or type(bits) is not int or bits not in sizes:
            raise UnsupportedError(
                f"{where}: weights of {bits!r:.20} bits ({kind!r:.20}) in {form} are not read"
            )
        out.append(Group(str(form), bits, str(kind), _block(where, weights)))
    return out


def _block(where: str, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    """What one scale is for: inputs of a group, or a block; None for a row or the tensor."""
    strategy = weights.get("strategy")
    group, block = weights.get("group_size"), weights.get("block_structure")
    if strategy is None:
        strategy = "group" if group not in (None, -1) else "channel" if group == -1 else "tensor"
    if strategy not in ("tensor", "channel", "group", "block"):
        raise UnsupportedError(f"{where}: weights of strategy {strategy!r:.40} are not read")
    size = None
    if strategy == "group":
        if type(group) is not int or group < 1:
            raise UnsupportedError(f"{where}: weights of group_size {group!r:.40} are not read")
        size = (1, group)
    if strategy == "block":
        block = block.split("x") if isinstance(block, str) else block
        try:
            high, wide = (int(n) for n in block or ())
        except (TypeError, ValueError):
            high = wide = 0
        if high < 1 or wide < 1:
            raise UnsupportedError(f"{where}: weights of block_structure {block!r:.40}")
        size = (high, wide)
    return size


def read(parts: Parts, groups: list[Group]) -> Spec:
    """The weight that these tensors are; it is one of `groups`. Raises FileFormatError."""
    if "weight_packed" in parts:
        return _packed(parts, [g for g in groups if g.form == "pack-quantized"])
    kind = parts.check("weight", ("f8_e4m3", "i8"))
    fitting = [g for g in groups if (g.kind == "float") == (kind != "i8")]
    if not fitting:
        parts.fail("weight", f"is {kind.upper()}, and quantization_config has no such weights")
    shape = parts.shape("weight")
    if len(shape) != 2 or not all(shape):
        parts.fail("weight", f"has shape {shape}; expected [out, in]")
    dtype = parts.check("weight_scale", FLOATS)
    d, k = shape
    high, wide = _grid(parts, (d, k), fitting)
    zero = "weight_zero_point" in parts
    if zero:
        parts.check("weight_zero_point", ("i8",), parts.shape("weight_scale"))

    def prepare() -> Callable[[int, int, int], Array]:
        codes = parts.array("weight") if kind == "i8" else parts.bytes("weight").reshape(d, k)
        blocks = (-(-d // high), -(-k // wide))
        scales = parts.floats("weight_scale").reshape(blocks)
        zeros = parts.array("weight_zero_point").reshape(blocks) if zero else None

        def rows(_: int, i: int, j: int) -> Array:
            q = codes[i:j]
            values = q.astype(np.float32) if kind == "i8" else VALUES[kind][q]
            if zeros is not None:
                values -= spread(zeros, i, j, high, wide, k)
            values *= spread(scales, i, j, high, wide, k)
            return values

        return rows

    return Spec((d, k), dtype, "int8" if kind == "i8" else "fp8", prepare)


def _grid(parts: Parts, shape: tuple[int, int], groups: list[Group]) -> tuple[int, int]:
    """What one scale is for, by the group that has scales of this shape."""
    found, (d, k) = parts.shape("weight_scale"), shape
    for block in [g.block for g in groups if g.block is not None]:
        if found == (-(-d // block[0]), -(-k // block[1])):
            return block
    return grid(parts, "weight_scale", shape, None)


def _packed(parts: Parts, groups: list[Group]) -> Spec:
    parts.check("weight_packed", ("i32",))
    parts.check("weight_shape", ("i64", "i32"), (2,))
    d, k = (int(n) for n in parts.array("weight_shape"))
    packed = parts.shape("weight_packed")
    fitting = [g for g in groups if d > 0 < k and packed == (d, words_for(k, g.bits))]
    if not fitting:
        known = " or ".join(sorted({str(g.bits) for g in groups})) or "no"
        parts.fail(
            "weight_packed", f"has shape {packed}, which is not [{d}, {k}] of {known} bits packed"
        )
    bits = fitting[0].bits
    dtype = parts.check("weight_scale", FLOATS)
    high, wide = _grid(parts, (d, k), [g for g in fitting if g.bits == bits])
    if high not in (1, d):
        parts.fail("weight_scale", "is of blocks, and packed weights have none")
    blocks, zero = (-(-d // high), -(-k // wide)), "weight_zero_point" in parts
    if zero:
        rows_of = words_for(blocks[0], bits)
        parts.check("weight_zero_point", ("i32",), (rows_of, blocks[1]))
    half = 1 << (bits - 1)

    def prepare() -> Callable[[int, int, int], Array]:
        codes = parts.array("weight_packed")
        scales = parts.floats("weight_scale").reshape(blocks)
        zeros = None
        if zero:
            turned = np.ascontiguousarray(parts.array("weight_zero_point").T)
            zeros = unpack(turned, bits, blocks[0]).T.astype(np.float32) - half
        index = None
        if "weight_g_idx" in parts:
            parts.check("weight_g_idx", ("i32", "i64"), (k,))
            if not (parts.array("weight_g_idx") == -1).all():  # which says: in turn
                index = parts.groups("weight_g_idx", k, blocks[1])

        def of(table: Array, i: int, j: int) -> Array:
            if index is None:
                return spread(table, i, j, high, wide, k)
            own: Array = table[np.arange(i, j) // high][:, index]
            return own

        def rows(_: int, i: int, j: int) -> Array:
            values: Array = unpack(codes[i:j], bits, k).astype(np.float32)
            values -= half
            if zeros is not None:
                values -= of(zeros, i, j)
            values *= of(scales, i, j)
            return values

        return rows

    return Spec((d, k), dtype, f"int{bits}", prepare)
