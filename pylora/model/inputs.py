"""What a caller hands to the model, checked before anything is computed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.errors import DataError, DtypeError, ShapeError, expect
from pylora.reference import IGNORE
from pylora.types import Seqs


def token_ids(ids: Any, vocab: int, *, labels: bool = False) -> np.ndarray:
    """int64 [m] of token ids (or labels, which may be IGNORE), all inside the vocabulary.

    Raises DtypeError, ShapeError, or DataError naming the first that is out of range.
    """
    what = "labels" if labels else "ids"
    expect("ids", ids, "the model" if not labels else "loss(ids, labels)")
    try:
        array = np.asarray(ids)
    except ValueError as error:  # lists of different lengths
        raise ShapeError(
            f"{what} must be one flat row of tokens, got lists of different lengths; put the "
            "sequences one behind the other and say where they begin with Seqs.of(lengths)"
        ) from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{what} must be whole numbers, got an array of {array.dtype}")
    if array.ndim != 1:
        raise ShapeError(
            f"{what} must be one flat row of tokens, got shape {list(array.shape)}; put the "
            "sequences one behind the other and say where they begin with Seqs.of(lengths)"
        )
    bad = (array < 0) | (array >= vocab)
    if labels:
        bad &= array != IGNORE
    if bad.any():
        i = int(np.argmax(bad))
        raise DataError(f"{what}[{i}] is {int(array[i])}, outside the vocabulary 0 .. {vocab - 1}")
    return np.ascontiguousarray(array, np.int64)


def whole_seqs(seqs: Seqs | None, m: int) -> Seqs:
    """`seqs`, or one sequence; ShapeError unless it cuts exactly m rows, keys beside queries."""
    if seqs is None:
        return Seqs.of([m])
    expect("Seqs", seqs, "seqs=")
    n = np.diff(seqs.q_start)
    if (
        seqs.q_start[0] != 0
        or seqs.q_start[-1] != m
        or (n < 0).any()
        or not np.array_equal(seqs.k_start, seqs.q_start[:-1])
        or not np.array_equal(seqs.k_len, n)
    ):
        raise ShapeError(f"seqs must cut the {m} rows into sequences; use Seqs.of(lengths)")
    return seqs


def row_numbers(rows: Any, m: int) -> np.ndarray:
    """int64 [n] of row numbers, each from 0 to m - 1. DtypeError or ShapeError otherwise."""
    array = np.asarray(rows)
    if array.size and array.dtype.kind not in "iu":
        raise DtypeError(f"rows must be whole numbers, got an array of {array.dtype}")
    if array.ndim != 1 or (array.size and not (0 <= array.min() and array.max() < m)):
        raise ShapeError(f"rows must be a flat list of numbers from 0 to {m - 1}, got {rows!r}")
    return array.astype(np.int64)


def row_weights(weight: Any, m: int, count: int, dtype: np.dtype) -> np.ndarray:
    """The weight of each row's loss [m]: the array given, a number for all, or 1 / count."""
    if weight is None:
        weight = 1 / max(count, 1)
    array = np.asarray(weight, np.empty(0, dtype).real.dtype)
    if array.shape not in ((), (m,)):
        raise ShapeError(f"weight has shape {list(array.shape)}, expected [{m}] or a number")
    return np.ascontiguousarray(np.broadcast_to(array, (m,)))
