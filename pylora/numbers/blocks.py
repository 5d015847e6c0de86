"""The blocks of ggml that a weight is multiplied in as a file has them: their sizes.

A row is cut into blocks of `numbers` numbers, each stored in `size` bytes. What the bytes are worth
is ggml_decode.py's matter; types that are not here are decoded, and stored anew, on loading.
"""

from __future__ import annotations

from pylora.errors import DtypeError, ShapeError

BLOCKS: dict[str, tuple[int, int]] = {  # kind -> (numbers, size)
    "q8_0": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "mxfp4": (32, 17),
}


def row_bytes(kind: str, k: int) -> int:
    """Bytes of a row of k numbers. ShapeError unless it is whole blocks (bf16: any k)."""
    if kind == "bf16":
        return 2 * k
    if kind not in BLOCKS:
        raise DtypeError(f"there is no stored kind {kind!r}; choose one of {', '.join(BLOCKS)}")
    numbers, size = BLOCKS[kind]
    if k % numbers:
        raise ShapeError(
            f"{kind} stores weights in groups of {numbers} inputs, and a row here has {k}"
        )
    return k // numbers * size
