"""Small whole numbers packed into 32-bit words, densely: number i is bits i b .. i b + b - 1 of a
row of words, the lowest bit first. So pack GPTQ (2, 3, 4 and 8 bits), AWQ and compressed-tensors.
"""

from __future__ import annotations

import numpy as np

from pylora.types import Array


def unpack(words: Array, bits: int, count: int) -> Array:
    """The first `count` numbers of each row: words int32 [rows, n], to uint8 [rows, count]."""
    w = np.ascontiguousarray(words).view("<u4")
    if bits in (2, 4, 8):
        some = w.view(np.uint8)
        if bits == 8:
            return some[:, :count]
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = (some[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(len(w), -1)[:, :count]
    out = np.empty((len(w), count), np.uint8)
    for i in range(min(32, count)):  # every 32 numbers begin a word again
        at, low = divmod(i * bits, 32)
        here = w[:, at::bits] >> np.uint32(low)
        if low + bits > 32:
            here = here | w[:, at + 1 :: bits] << np.uint32(32 - low)
        column = out[:, i::32]
        column[:] = (here & np.uint32((1 << bits) - 1))[:, : column.shape[1]]
    return out


def words_for(count: int, bits: int) -> int:
    """How many words `count` numbers take."""
    return -(-count * bits // 32)
