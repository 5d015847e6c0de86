"""Laws of an embedding with an adapter: A is [r, vocab], and a token's x is its one-hot row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pylora.conformance.bounds import adapted as bounds
from pylora.conformance.bounds import layer
from pylora.conformance.laws import oracle
from pylora.conformance.laws.dropout import UNLIKELY
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.adapted import (
    ALL_DTYPES,
    beyond_embeddings,
    embeddings,
    exact_embeddings,
)
from pylora.conformance.problems.layers import SEEDS, st
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

EXACT = ("float32", "float64")


def _rows(p: Problem, W: Array) -> Array:
    """The exact y."""
    h = layer.wide(p.A)[:, p.ids].T
    return layer.wide(W)[p.ids] + float(p.scale) * (h @ layer.wide(p.B).T)


def _forward(t: Trial, p: Problem) -> None:
    y, W = t.embedding_forward(p.ids, p.W, p.A, p.B, p.scale), t.weight(p.W)
    t.expect("y", y, _rows(p, W), bounds.embedding(p.ids, W, p.A, p.B, p.scale))


def _forward_exact(t: Trial, p: Problem) -> None:
    y = t.embedding_forward(p.ids, p.W, p.A, p.B, p.scale)
    t.expect("y", y, _rows(p, t.weight(p.W)))


def _fresh(t: Trial, p: Problem) -> None:
    """A = 0, as an embedding starts, or B = 0: the base's rows, signs of zeros included."""
    W = t.weight(p.W)
    for name, changed in (("A", {"A": np.zeros_like(p.A)}), ("B", {"B": np.zeros_like(p.B)})):
        q = p.replaced(**changed)
        y = t.embedding_forward(q.ids, q.W, q.A, q.B, q.scale)
        t.expect(f"y with {name} = 0", y, W[p.ids], signs=t.bitwise)


def _undropped(t: Trial, p: Problem) -> None:
    """Whatever p and seed are, the rows are those without."""
    for rate, seed in ((0.5, p.seed), (0.9, p.seed + 1), (0.0, p.seed)):
        y = t.embedding_dropout(p.ids, p.W, p.A, p.B, p.scale, rate, seed)
        t.expect(f"y with p = {rate}", y, _rows(p, t.weight(p.W)))


def _gradients(p: Problem) -> tuple[Array, Array]:
    D, A, B, s = layer.wide(p.dy), layer.wide(p.A), layer.wide(p.B), float(p.scale)
    columns = np.zeros((p.A.shape[1], p.A.shape[0]), D.dtype)
    np.add.at(columns, p.ids, s * (D @ B))
    return columns.T, s * (D.T @ A[:, p.ids].T)


def _backward(t: Trial, p: Problem) -> None:
    got = t.embedding_backward(p.dy, p.ids, p.W, p.A, p.B, p.scale)
    limits = bounds.embedding_backward(p.dy, p.ids, p.A, p.B, p.scale)
    for name, g, w, off in zip(("dA", "dB"), got, _gradients(p), limits):
        t.expect(name, g, w, off)


def _backward_exact(t: Trial, p: Problem) -> None:
    got = t.embedding_backward(p.dy, p.ids, p.W, p.A, p.B, p.scale)
    for name, g, w in zip(("dA", "dB"), got, _gradients(p)):
        t.expect(name, g, w)


def _out_of_range(t: Trial, p: Problem) -> None:
    """An id that is no token, in a dtype that holds it: past the end, or negative."""
    vocab, n = p.W.shape[0], len(p.ids)
    if not n:
        return
    past = (0, 1, 7, vocab, 2**31 - 1, 2**32 - vocab)[p.seed % 6]
    bad = vocab + past if (p.seed // 8) % 2 else -1 - past
    ids = p.ids.astype(np.int64)
    ids[(p.seed // 16) % n] = bad
    why = f"ids = {ids.tolist()} with a vocabulary of {vocab}"
    t.must_raise(why, "embedding_forward", ids, p.W, p.A, p.B, p.scale)
    if callable(getattr(t.implementation, "embedding_backward", None)):
        t.must_raise(why, "embedding_backward", p.dy, ids, p.W, p.A, p.B, p.scale)


def _transposed(p: Problem) -> tuple[Array, Array, Array, float]:
    """The embedding as a linear module for `merged`: W + s (B A)ᵀ = W + s Aᵀ Bᵀ."""
    return p.W, p.B.T, p.A.T, p.scale


def _merge(t: Trial, p: Problem) -> None:
    W = t.embedding_merge(p.W, p.A, p.B, p.scale)
    t.expect("W'", W, oracle.merged(*_transposed(p)), layer.merged(*_transposed(p)))


def _merged_is_the_adapter(t: Trial, p: Problem) -> None:
    W = t.embedding_merge(p.W, p.A, p.B, p.scale)
    merged = t.embedding_forward(p.ids, W, np.zeros_like(p.A), np.zeros_like(p.B), p.scale)
    apart = t.embedding_forward(p.ids, p.W, p.A, p.B, p.scale)
    t.expect("y of the merged embedding against the adapter's", merged, apart)


# ---- how it starts -------------------------------------------------------------------------------


def _inits() -> object:
    return st.builds(
        lambda vocab, hidden, r, seed, random: Problem(
            vocab=vocab, hidden=hidden, r=r, seed=seed, random=random
        ),
        st.sampled_from((512, 700)),
        st.sampled_from((256, 384)),
        st.sampled_from((4, 8)),
        SEEDS,
        st.booleans(),
    )


def _starts(t: Trial, p: Problem) -> None:
    A, B = t.embedding_init(p.vocab, p.hidden, p.r, p.seed, p.random)
    if p.random:
        _normal(t, "A", A)
    else:
        t.expect("A", A, np.zeros(A.shape))
    _normal(t, "B", B)
    again, _ = t.embedding_init(p.vocab, p.hidden, p.r, p.seed, p.random)[::-1]
    t.expect("B of the same seed", again, B)


def _normal(t: Trial, name: str, raw: Any) -> None:
    """Mean 0 and mean square 1 of n elements, and that it is no other distribution of that kind:
    the share within ±1. Tails of chance 10⁻¹⁸: Gauss; Laurent & Massart 2000, lemma 1 (the sum of
    squares); Hoeffding."""
    a = np.asarray(raw, np.float64)
    n, limit = a.size, math.log(2 / UNLIKELY)
    mean, square = math.sqrt(2 * limit / n), 2 * math.sqrt(limit / n) + 2 * limit / n
    if abs(a.mean()) > mean:
        said = f"the mean of {n} elements of {name} is {a.mean():.3g}, beyond ±{mean:.3g}"
        t.fail(said, raw, f"abs(RESULT.mean(dtype=float)) <= {mean}")
    got = float((a**2).mean())
    if abs(got - 1) > square:
        said = f"the mean square of {name} is {got:.4g}, expected 1 ± {square:.2g}"
        t.fail(said, raw, f"abs((RESULT.astype(float) ** 2).mean() - 1) <= {square}")
    share, off = float((np.abs(a) <= 1).mean()), math.sqrt(limit / (2 * n))
    if abs(share - math.erf(0.5**0.5)) > off:
        said = f"{share:.3f} of {name} is within ±1, of normal numbers 0.683 ± {off:.2g} is"
        t.fail(said, raw, f"abs((abs(RESULT) <= 1).mean() - {math.erf(0.5**0.5)}) <= {off}")


LAWS = (
    Law(
        "E3",
        "An embedding gives W's rows and the adapter's columns.",
        "y[i] = W[ids[i]] + s A[:, ids[i]]ᵀ Bᵀ, ids of any integer dtype, gamma_{r+5}",
        "A is looked up by rows, one token's column serves all, or ids are cut to 8 or 16 bits",
        ("F-5", "N-1"),
        ("embedding_forward",),
        embeddings,
        _forward,
        ("W", "A", "B"),
        dtypes=ALL_DTYPES,
        covering=beyond_embeddings,
    ),
    Law(
        "E4",
        "Embeddings are exact on small integers.",
        "as E3, with equality",
        "as E3; also an update that goes through a 16-bit format",
        ("F-5",),
        ("embedding_forward",),
        exact_embeddings,
        _forward_exact,
        ("W", "A", "B"),
        dtypes=EXACT,
    ),
    Law(
        "E5",
        "A fresh adapter of an embedding changes nothing.",
        "A = 0, or B = 0, implies y[i] = W[ids[i]], where bits are promised bit for bit",
        "zeros are added (-0 becomes +0)",
        ("F-2", "V-6", "I-1"),
        ("embedding_forward",),
        embeddings,
        _fresh,
        ("W",),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "E10",
        "While an embedding trains nothing is dropped.",
        "y(p, seed) = W[ids] + s A[:, ids]ᵀ Bᵀ for any p and seed, exact on small integers",
        "tokens, ranks or outputs of the adapter are dropped, or what is kept is scaled up",
        ("D-6", "F-5"),
        ("embedding_dropout",),
        exact_embeddings,
        _undropped,
        ("W", "A", "B"),
        dtypes=EXACT,
    ),
    Law(
        "E6",
        "A token's gradient is the sum over all rows that have it.",
        "dA[:, t] = s Σ g[i] over ids[i] = t, zeros of tokens that do not occur; dB = s dyᵀ h",
        "of equal ids only the last counts (dA[:, ids] += g), or the ends of the vocabulary miss",
        ("B-6", "B-1"),
        ("embedding_backward",),
        embeddings,
        _backward,
        ("dy", "A", "B"),
        dtypes=ALL_DTYPES,
        covering=beyond_embeddings,
    ),
    Law(
        "E7",
        "Gradients of embeddings are exact on small integers.",
        "as E6, with equality",
        "as E6",
        ("B-6",),
        ("embedding_backward",),
        exact_embeddings,
        _backward_exact,
        ("dy", "A", "B"),
        dtypes=EXACT,
    ),
    Law(
        "E8",
        "An id that is no token is an error.",
        "ids[i] < 0 and ids[i] >= vocab must raise, forward and backward",
        "a negative id counts from the end, or memory beyond the table is read",
        ("E-1",),
        ("embedding_forward", "float32"),
        exact_embeddings,
        _out_of_range,
        (),
    ),
    Law(
        "E9",
        "A merged embedding is W + s (B A)ᵀ.",
        "|W' - (W + s (B A)ᵀ)| within M1's bound, in 16 bits rounded once",
        "the product is not transposed, not scaled, or rounded before it is added",
        ("E-2", "M-1", "S-3"),
        ("embedding_merge",),
        embeddings,
        _merge,
        ("W", "A", "B"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "M23",
        "A merged embedding gives the adapter's output.",
        "y(W', no adapter) = y(W, adapter), exact on small integers",
        "merge and adapter disagree",
        ("E-2", "M-2"),
        ("embedding_merge", "embedding_forward"),
        exact_embeddings,
        _merged_is_the_adapter,
        ("W", "A", "B"),
        dtypes=EXACT,
    ),
    Law(
        "I5",
        "An embedding's A starts as zeros and its B normal.",
        "A = 0 (with init_lora_weights = false normal too), B ~ N(0, 1): mean, mean square and the "
        "share within ±1, tails of chance 10⁻¹⁸; the same seed, the same numbers",
        "A and B are exchanged, or B is Kaiming-uniform like a linear module's A",
        ("I-5", "I-1", "I-6"),
        ("embedding_init",),
        _inits,
        _starts,
        (),
    ),
)
