"""Blocks of ggml's other kinds as kinds that products can take: Q4_K as Q4_1, Q5_0 as Q8_0.

    q4_k    144 bytes, 256 numbers: d, dmin (float16), 8 x (scale, minimum) of 6 bits, 256 codes of
            4 bits; group g has the values d scale_g q - dmin minimum_g
    q5_0    22 bytes, 32 numbers: d (float16), the high bits, 32 codes of 4 bits: d (q - 16)

The codes stay. Q5_0 becomes Q8_0 exactly. Of Q4_K the two numbers of a group, d scale_g and
dmin minimum_g, are rounded to float16: a value moves by at most 2^-11 (15 |d scale_g| +
|dmin minimum_g|), and 2^-25 (15 + 1) where they are subnormal. A weight with a number that float16
cannot hold is not recoded.
"""

from __future__ import annotations

import numpy as np

from pylora.types import Array

RECODED = {"q4_k": "q4_1", "q5_0": "q8_0"}
_BYTES = {"q4_k": 144, "q5_0": 22}


def recode(rows: Array, kind: str) -> Array | None:
    """uint8 [d, bytes of a row] of `kind` -> the same rows in RECODED[kind]; None where float16
    cannot hold a scale."""
    blocks = np.ascontiguousarray(rows).reshape(-1, _BYTES[kind])
    with np.errstate(all="ignore"):
        made = _from_q4_k(blocks) if kind == "q4_k" else _from_q5_0(blocks)
    return None if made is None else made.reshape(rows.shape[0], -1)


def _from_q4_k(blocks: Array) -> Array | None:
    n = len(blocks)
    d, dmin = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    packed = blocks[:, 4:16]
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scale = np.hstack([first & 63, (third & 15) | (first >> 6) << 4])
    minimum = np.hstack([second & 63, (third >> 4) | (second >> 6) << 4])
    head = np.stack([d * scale, -(dmin * minimum)], axis=-1).astype("<f2")  # [n, 8, 2]
    if not np.isfinite(head).all():
        return None
    low, high = blocks[:, 16:] & 15, blocks[:, 16:] >> 4
    # 32 bytes hold two groups: one in their low halves, the next in their high halves.
    codes = np.stack([low.reshape(n, 4, 32), high.reshape(n, 4, 32)], axis=2).reshape(n, 8, 32)
    halves = codes[:, :, :16] | codes[:, :, 16:] << 4
    out = np.empty((n, 8, 20), np.uint8)
    out[:, :, :4] = head.view(np.uint8).reshape(n, 8, 4)
    out[:, :, 4:] = halves
    return out


def _from_q5_0(blocks: Array) -> Array:
    n = len(blocks)
    high = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")  # [n, 32]
    nibbles = np.hstack([blocks[:, 6:] & 15, blocks[:, 6:] >> 4])
    out = np.empty((n, 34), np.uint8)
    out[:, :2] = blocks[:, :2]
    out[:, 2:] = ((nibbles | high << 4).astype(np.int8) - 16).view(np.uint8)
    return out
