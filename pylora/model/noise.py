"""NEFTune: noise on the embeddings of a training step (Jain et al. 2023).

To each number that a token's embedding has, uniform noise on (-b, b) is added, b = alpha /
sqrt(L * hidden), L being the length of the token's own sequence. transformers takes the length that
a batch was padded to in place of L; here nothing is padded, so a sequence's noise does not depend
on what it is trained beside. Element (row of the whole step) * hidden + column of the stream
"neftune/<step>" is the number's (docs/random.md), whatever the micro-batches and processes.
"""

from __future__ import annotations

import numpy as np

from pylora.numbers import random
from pylora.types import Seqs

_ROWS = 256  # made at a time: bounds the memory, does not change the bits


def neftune(
    alpha: float, seqs: Seqs, hidden: int, *, seed: int, step: int, row0: int
) -> np.ndarray:
    """The noise of a micro-batch's rows, the first of which is row `row0` of the step; float32
    [rows, hidden]."""
    lengths = np.diff(seqs.q_start)
    bounds = np.repeat(alpha / np.sqrt(lengths.astype(np.float64) * hidden), lengths)
    name = random.stream("neftune", str(step))
    out = np.empty((bounds.size, hidden), np.float32)
    for a in range(0, bounds.size, _ROWS):
        some = bounds[a : a + _ROWS, None]
        first, n = (row0 + a) * hidden, some.size * hidden
        unit = random.unit(seed, name, first, n).reshape(some.size, hidden)
        out[a : a + _ROWS] = (unit * 2.0 - 1.0) * some
    return out
