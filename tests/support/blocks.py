"""Random blocks of ggml, as a file might hold them, and what their values are made of."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np

from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.precision import Stored

# Where a block's float16 numbers are: its scale, and what its minimums are made of.
_HALVES = {
    "q4_1": (0, 2), "q5_1": (0, 2), "q4_k": (0, 2), "q5_k": (0, 2), "q2_k": (80, 82),
    "q3_k": (108,), "q6_k": (208,), "mxfp4": (),
}  # fmt: skip
# The bytes of codes, of kinds with minimums: with these zero, a value is its minimum.
_CODES = {"q4_1": (4, 20), "q5_1": (4, 24), "q4_k": (16, 144), "q5_k": (16, 176), "q2_k": (16, 80)}


def qtype(kind: str) -> Any:
    return gguf.GGMLQuantizationType[kind.upper()]


def random_blocks(rng: np.random.Generator, kind: str, d: int, k: int) -> Stored:
    """Random codes with scales of many sizes and both signs, among them 0 and subnormal ones."""
    rows = rng.integers(0, 256, (d, row_bytes(kind, k)), np.uint8)
    blocks = rows.reshape(-1, BLOCKS[kind][1])
    for at in _HALVES.get(kind, (0,)):
        scales = rng.normal(size=len(blocks)) * 10.0 ** rng.integers(-8, 2, len(blocks))
        blocks[:, at : at + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == "mxfp4":
        blocks[:, 0] = rng.integers(100, 136, len(blocks))
    return Stored(kind, rows, (d, k))


def values(stored: Stored) -> np.ndarray:
    """What gguf-py decodes."""
    with np.errstate(all="ignore"):
        return np.asarray(gguf.quants.dequantize(stored.rows, qtype(stored.kind)))


def magnitudes(stored: Stored) -> np.ndarray:
    """|scale code| + |minimum| of each weight, at least, float64: what the terms of a sum are made
    of."""
    size = np.abs(values(stored), dtype=np.float64)
    if stored.kind not in _CODES:
        return size
    rows = stored.rows.copy()
    start, end = _CODES[stored.kind]
    rows.reshape(-1, BLOCKS[stored.kind][1])[:, start:end] = 0
    return size + 2 * np.abs(values(Stored(stored.kind, rows, stored.shape)), dtype=np.float64)
