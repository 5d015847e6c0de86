"""Hypothesis strategies for mixed batches with gradients, biases of B and embeddings.

Each takes the dtype. The `beyond_...` functions list problems that are large in one dimension and
tiny in the others: just past every size at which a kernel might end (`LIMITS`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.problems.layers import (
    SCALES,
    SEEDS,
    assigned,
    elements,
    integer_array,
    np_dtype,
    pick,
    st,
)
from pylora.conformance.problems.layouts import laid_out
from pylora.conformance.problems.sizes import LIMITS
from pylora.conformance.testcase import Problem
from pylora.types import Array

TAME = ("normal", "integers", "positive", "ones", "zeros")
ALL_DTYPES = ("float32", "float64", "bfloat16", "float16")
MEMORY = ("C", "C", "F", "stepped", "negative", "readonly", "columns")
_EITHER = st.booleans()
_POWERS = (1.0, 2.0, 0.5, -1.0, 0.0, -2.0)


def sizes(most: int, examples: int = 100) -> Iterator[int]:
    """One beyond each of LIMITS up to `most`; the larger ones in runs of many examples alone."""
    for limit in LIMITS:
        if limit <= most * max(1, examples // 100):
            yield limit + 1


@st.composite  # type: ignore[untyped-decorator]
def mixed_gradients(draw: Any, dtype: str = "float32", exact: bool = False) -> Problem:
    """dy, x, W, bias, 0 to 5 adapters of different rank and scale, and whose each row is; `biases`
    of their B, some of them None."""
    m, n = draw(pick((1, 2, 3, 4, 6, 0, 9, 16))), draw(pick((1, 2, 3, 0, 5)))
    k, d = draw(pick((1, 2, 5, 16, 33))), draw(pick((1, 2, 5, 16, 33)))
    ranks = [draw(pick((1, 2, 3, 8, 17))) for _ in range(n)]
    scales = [draw(pick(_POWERS if exact else SCALES)) for _ in range(n)]
    kind, rng, plain = draw(pick(TAME)), np.random.default_rng(draw(SEEDS)), draw(_EITHER)
    patterns = ("random", "runs", "alternating", "returns", "one", "none")
    rows = assigned(draw(pick(patterns)), m, n, rng)

    def make(*shape: int) -> Array:
        a = integer_array(rng, shape, 2) if exact else elements(rng, shape, kind, dtype)
        return laid_out(a.astype(np_dtype(dtype)), "C" if plain else str(rng.choice(MEMORY)))

    return Problem(
        dy=make(m, d),
        x=make(m, k),
        W=make(d, k),
        bias=make(d) if draw(_EITHER) else None,
        adapters=[(make(r, k), make(d, r), s) for r, s in zip(ranks, scales)],
        biases=[make(d) if rng.random() < 0.7 else None for _ in ranks],
        rows=rows,
        seed=int(rng.integers(2**16)),
    )


def exact_mixed(dtype: str = "float32") -> Any:
    """The same with small integers and scales that are powers of two."""
    return mixed_gradients(dtype, exact=True)


def mixed_of(size: int, where: str, dtype: str) -> Problem:
    """A mixed batch that is `size` in one of: adapters, segments, rows (of one segment), rank, k,
    d."""
    rng = np.random.default_rng(size)
    n = size if where == "adapters" else 3
    m = {"segments": size, "rows": size + 3, "adapters": 7}.get(where, 5)
    k, d = (size if where == w else 2 for w in ("k", "d"))
    ranks = [size if where == "rank" and i == 1 else 1 + i % 2 for i in range(n)]
    rows = rng.integers(-1, n, m)
    if where == "segments":  # each row another adapter than the one before
        rows = np.arange(m) % 4 - 1
    elif where == "rows":
        rows = np.sort(np.append(np.full(size, 1), [0, 2, -1]))
    elif where == "adapters":  # the last ones above all
        rows = np.append(np.arange(n - 5, n), [-1, 0])

    kind = "positive" if where == "rows" else "normal"  # of one sign: where narrow sums stand still

    def make(*shape: int) -> Array:
        return elements(rng, shape, kind, dtype)

    return Problem(
        dy=make(m, d),
        x=make(m, k),
        W=make(d, k),
        bias=None,
        adapters=[(make(r, k), make(d, r), 1.0 + i % 3) for i, r in enumerate(ranks)],
        biases=[make(d) if i % 2 else None for i in range(n)],
        rows=rows.astype(np.int64),
        seed=size,
        size=size,
        resized=lambda n: mixed_of(n, where, dtype),
    )


def beyond_mixed(dtype: str, examples: int) -> Iterator[Problem]:
    """Mixed batches past every limit, one dimension at a time."""
    for where, most in (
        ("rank", 512), ("rows", 1024), ("segments", 256), ("adapters", 256), ("k", 512), ("d", 512),
    ):  # fmt: skip
        for size in sizes(most if dtype == "float32" else 64, examples):
            yield mixed_of(size, where, dtype)
    yield mixed_of(1025, "rows", dtype)


@st.composite  # type: ignore[untyped-decorator]
def biased(draw: Any, dtype: str = "float32", exact: bool = False) -> Problem:
    """One adapter with a bias of B: x, dy, W, A, B, bias_B, scale, and the base's bias or None."""
    m, k, d = (draw(pick(n)) for n in ((1, 2, 3, 0, 9), (1, 2, 5, 16, 33), (1, 2, 5, 16, 33)))
    r, kind = draw(pick((1, 2, 3, 8))), draw(pick(TAME))
    rng, plain = np.random.default_rng(draw(SEEDS)), draw(_EITHER)

    def make(*shape: int) -> Array:
        a = integer_array(rng, shape, 2) if exact else elements(rng, shape, kind, dtype)
        return laid_out(a.astype(np_dtype(dtype)), "C" if plain else str(rng.choice(MEMORY)))

    zero = draw(pick((False, False, True)))
    B = make(d, r)
    return Problem(
        x=make(m, k),
        dy=make(m, d),
        W=make(d, k),
        A=make(r, k),
        B=np.zeros_like(B) if zero else B,
        bias_B=make(d),
        scale=draw(pick(_POWERS if exact else SCALES)),
        bias=make(d) if draw(_EITHER) else None,
        seed=int(rng.integers(2**16)),
    )


def bias_of(size: int, dtype: str) -> Problem:
    """One adapter with a bias of B and `size` rows of one sign."""
    rng = np.random.default_rng(size)

    def make(*shape: int) -> Array:
        return elements(rng, shape, "positive", dtype)

    fields = {
        "x": (size, 2),
        "dy": (size, 2),
        "W": (2, 2),
        "A": (1, 2),
        "B": (2, 1),
        "bias_B": (2,),
    }
    return Problem(
        **{name: make(*shape) for name, shape in fields.items()},
        scale=0.5,
        bias=None,
        seed=size,
        size=size,
        resized=lambda n: bias_of(max(1, n), dtype),
    )


def beyond_biases(dtype: str, examples: int) -> Iterator[Problem]:
    """Rows past every limit."""
    for size in sizes(4096, examples):
        yield bias_of(size, dtype)


def exact_biased(dtype: str = "float32") -> Any:
    return biased(dtype, exact=True)


# ---- embeddings ----------------------------------------------------------------------------------

IDS = ("int64", "int32", "uint32", "int16", "uint8")


def tokens(draw: Any, m: int, vocab: int, rng: np.random.Generator) -> Array:
    """m ids below vocab: at random, one token again and again, both ends, each once; of any
    integer dtype that holds them."""
    pattern = draw(pick(("random", "same", "ends", "runs", "once")))
    if pattern == "same":
        ids = np.full(m, int(rng.integers(vocab)))
    elif pattern == "ends":
        ids = rng.choice([0, vocab - 1], m)
    elif pattern == "runs":
        ids = np.sort(rng.integers(0, vocab, m))
    elif pattern == "once":
        ids = rng.permutation(vocab)[:m]
    else:
        ids = rng.integers(0, vocab, m)
    kind = np.dtype(draw(pick(IDS)))
    return ids.astype(kind if vocab - 1 <= np.iinfo(kind).max else np.int64)


@st.composite  # type: ignore[untyped-decorator]
def embeddings(draw: Any, dtype: str = "float32", exact: bool = False) -> Problem:
    """ids [m], W [vocab, hidden], A [r, vocab], B [hidden, r], scale and dy [m, hidden]."""
    m, vocab = draw(pick((1, 2, 3, 5, 0, 17, 40))), draw(pick((1, 2, 3, 7, 33, 130, 300)))
    hidden, r = draw(pick((1, 2, 5, 16))), draw(pick((1, 2, 3, 8)))
    kind, rng = draw(pick(TAME)), np.random.default_rng(draw(SEEDS))
    plain, ids = draw(_EITHER), tokens(draw, m, vocab, rng)

    def make(*shape: int) -> Array:
        a = integer_array(rng, shape, 2) if exact else elements(rng, shape, kind, dtype)
        return laid_out(a.astype(np_dtype(dtype)), "C" if plain else str(rng.choice(MEMORY)))

    return Problem(
        ids=ids,
        W=make(vocab, hidden),
        A=make(r, vocab),
        B=make(hidden, r),
        dy=make(len(ids), hidden),
        scale=draw(pick(_POWERS if exact else SCALES)),
        seed=int(rng.integers(2**16)),
    )


def exact_embeddings(dtype: str = "float32") -> Any:
    return embeddings(dtype, exact=True)


def embedding_of(size: int, where: str, dtype: str) -> Problem:
    """An embedding that is `size` in vocab, tokens (all of few ids), hidden or rank."""
    rng = np.random.default_rng(size)
    vocab, hidden, r = (
        size if where == w else n for w, n in (("vocab", 5), ("hidden", 2), ("rank", 2))
    )
    ids = rng.integers(0, min(vocab, 3), size if where == "tokens" else 6)
    if where == "vocab":
        ids = np.array([vocab - 1, 0, vocab - 2, vocab - 1, vocab // 2, 1])

    kind = "positive" if where == "tokens" else "normal"

    def make(*shape: int) -> Array:
        return elements(rng, shape, kind, dtype)

    return Problem(
        ids=ids.astype(np.int64),
        W=make(vocab, hidden),
        A=make(r, vocab),
        B=make(hidden, r),
        dy=make(len(ids), hidden),
        scale=0.5,
        seed=size,
        size=size,
        resized=lambda n: embedding_of(max(2, n), where, dtype),
    )


def beyond_embeddings(dtype: str, examples: int) -> Iterator[Problem]:
    """Embeddings past every limit; a vocabulary past 65536 always."""
    for where, most in (("vocab", 65536), ("tokens", 1024), ("hidden", 1024), ("rank", 256)):
        for size in sizes(most if dtype == "float32" else 128, examples):
            yield embedding_of(size, where, dtype)
    yield embedding_of(1025, "tokens", dtype)
