"""Writes csrc/files/iq_grids.inc: the points of ggml's IQ grids, from the package gguf.

    python tools/iq_grids.py > csrc/files/iq_grids.inc

A point is 8 numbers of 2 bits, or 4 of 3 bits, each the index of its value, the first in the lowest
bits. A test compares what the C core decodes with gguf itself, so a wrong table cannot stay.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

GRIDS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")


def packed(kind: Any) -> list[int]:
    """The points of a gguf quant class, each as one number."""
    kind.init_grid()
    points = np.asarray(kind.grid).reshape(kind.grid_shape)
    index = np.searchsorted(np.asarray(kind.grid_map, np.float32), points)
    width = 2 if len(kind.grid_map) == 3 else 3
    return [sum(int(v) << (width * i) for i, v in enumerate(point)) for point in index]


def main() -> None:
    from gguf import quants

    out = sys.stdout
    out.write("/* iq_grids.inc - written by tools/iq_grids.py: points of ggml's IQ grids. */\n")
    out.write("/* clang-format off */\n")
    for name in GRIDS:
        points = packed(getattr(quants, name))
        out.write(f"static const uint16_t {name.lower()}_grid[{len(points)}] = {{\n")
        for i in range(0, len(points), 16):
            out.write("    " + " ".join(f"{p}," for p in points[i : i + 16]) + "\n")
        out.write("};\n")


if __name__ == "__main__":
    main()
