"""The next token of each row of logits, and its likeliest ones, on the C core.

No operation of a backend: logits of any of them, once they are NumPy arrays of float32, are chosen
from here, so that one process chooses in one way.
"""

from __future__ import annotations

import numpy as np

from pylora.backends._core import ffi, lib
from pylora.backends.c.marshal import Scratch, at, check, mat, read
from pylora.types import Array

# pylora_sampling, field by field. `allowed` is the address of the words, 0: all may come.
HOW = np.dtype(
    [
        ("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("u", "f8"),
        ("top_k", "i8"), ("allowed", np.uintp), ("words", "i8"),
    ],
    align=True,
)  # fmt: skip
NOT_FINITE, NOTHING = -1, -2  # in the place of a token
_scratch = Scratch()


def sample(logits: Array, how: np.ndarray) -> np.ndarray:
    """int64 [m]: the token of each row of logits, float32 [m, vocab], by `how`, HOW [m]; NOT_FINITE
    of a row with a NaN or an infinite number, NOTHING where no token is allowed. What the addresses
    in `how` point at must live until this returns. Raises ShapeError or BackendError for what does
    not fit."""
    logits = read("logits", logits, how.size, None)
    tokens = np.empty(how.size, np.int64)
    settings = ffi.cast("pylora_sampling *", how.ctypes.data)
    room = _scratch.at_least(lib.pylora_sample_workspace(*logits.shape))
    check(lib.pylora_sample(mat(logits), settings, at(tokens, "int64_t *"), *room), "sample")
    return tokens


def likeliest(logits: Array, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float64 [m]: log sum exp of each row of logits, float32 [m, vocab]; int64 [m, most]: the
    count[i] largest of row i, largest first, of equals the first). Rows of a count below 0 are left
    alone; a row that is not finite has NaN."""
    m = count.size
    logits, most = read("logits", logits, m, None), max(0, int(count.max(initial=0)))
    lse, best = np.full(m, np.nan), np.zeros((m, most), np.int64)
    room = _scratch.at_least(lib.pylora_sample_workspace(*logits.shape))
    i64 = "int64_t *"
    status = lib.pylora_likeliest(
        mat(logits), at(count, i64), most, at(lse, "double *"), at(best, i64), *room
    )
    check(status, "likeliest")
    return lse, best
