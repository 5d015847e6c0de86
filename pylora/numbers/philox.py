"""Philox 4x32-10: random words as a pure function of seed, stream and number.

Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(seed: int, stream: int, first: int, n: int, xp: Any = np) -> Any:
    """Words first .. first+n-1 of a stream, uint32 [n], in an array of the library `xp`.

    The key is `seed`, block b has the counter (b, stream), word e is word e % 4 of block e // 4.
    """
    block = xp.arange(first // 4, (first + n + 3) // 4, dtype=np.uint64)
    one = xp.ones_like(block)
    c = [block & _LOW, block >> 32, one * (stream & _LOW), one * (stream >> 32)]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(_MULTIPLIERS[0]), c[2] * np.uint64(_MULTIPLIERS[1])
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & _LOW, (p0 >> 32) ^ c[3] ^ key[1], p0 & _LOW]
        key = [(key[0] + _WEYL[0]) & _LOW, (key[1] + _WEYL[1]) & _LOW]
    words = xp.stack(c, axis=1).reshape(-1).astype(np.uint32)
    return words[first % 4 : first % 4 + n]
