"""Laws of special numbers where rows have adapters of their own, where something is left out, or
where tokens see one another: mixed batches, stacked adapters, dropout, losses, attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds.moves import GROUP
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.block import Block
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.special import ALL, ODD, poisoned, reaches
from pylora.conformance.problems import sizes
from pylora.conformance.problems.layers import (
    DTYPES,
    attention_problems,
    pick,
    several_adapters,
    st,
)
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

PLACES = st.tuples(st.integers(0, 99), st.integers(0, 99))


def _odd(problems: Any) -> Any:
    """The same problems with an odd number and a place for it."""
    return st.builds(lambda p, odd, at: p.replaced(odd=odd, at=at), problems, pick(ODD), PLACES)


def several(dtype: str = "float32") -> Any:
    """Exact problems of several adapters, at least one, whose B and scales are not zero: stacked,
    s B of an adapter whose scale is zero is a B of zeros (X-2)."""

    def ready(p: Problem) -> Problem:
        full = [np.where(B == 0, 1, B).astype(B.dtype) for _, B, _ in p.adapters]
        adapters = [(A, B, s or 1.0) for (A, _, s), B in zip(p.adapters, full)]
        return p.replaced(adapters=adapters)

    drawn = several_adapters(dtype, exact=True).filter(lambda p: p.adapters and len(p.rows))
    return _odd(drawn.map(ready))


def _grouped_weights(dtype: str) -> Any:
    """Weights of three rows and three groups of 32, and an odd number at any place in them."""
    kinds = st.integers(0, 99).map(lambda seed: sizes.layer(dtype, seed, m=2, k=70, d=3, r=2))
    return _odd(kinds)


def _in_its_group(t: Trial, p: Problem) -> None:
    """NaN in W reaches its column of y; what is stored of other groups, and other columns, stay."""
    i, j = p.at[0] % p.W.shape[0], p.at[1] % p.W.shape[1]
    W = p.W.copy()
    W[i, j] = p.odd
    kept, before = t.weight(W), t.weight(p.W)
    elsewhere = np.ones(W.shape, bool)
    elsewhere[i, j // GROUP * GROUP : (j // GROUP + 1) * GROUP] = False
    if t.precision in ("int8", "int4"):
        said = f"what is stored of other groups than that of W[{i},{j}] = {p.odd}"
        t.expect(said, kept[elsewhere], before[elsewhere])
    others = [n for n in range(W.shape[0]) if n != i]
    y = t.forward(p.x, W, p.A, p.B, p.scale, p.bias)
    want = oracle.forward(p.x, before, [(p.A, p.B, p.scale)], p.bias)
    off = np.broadcast_to(np.asarray(allowed.forward(t, p), np.float64), want.shape)
    at = (slice(None), np.array(others))
    t.expect(f"y of other outputs than that of W[{i},{j}] = {p.odd}", y, want[at], off[at], at=at)
    shown = np.zeros(want.shape, bool)
    shown[:, i] = True
    _shown(t, f"y with W[{i},{j}] = {p.odd}", y, np.inf, shown)


def _with(p: Problem, which: int) -> list[Any]:
    """The adapters, one of them with the odd number in A."""
    A, B, s = p.adapters[which]
    odd = A.copy()
    odd[p.at[0] % A.shape[0], p.at[1] % A.shape[1]] = p.odd
    adapters = list(p.adapters)
    adapters[which] = odd, B, s
    return adapters


def _shown(t: Trial, what: str, y: Any, odd: float, where: Array) -> None:
    """Every element of y at `where` shows the odd number."""
    part = np.asarray(y, np.float64)[where]
    if not (np.isnan(part) if np.isnan(odd) else ~np.isfinite(part)).all():
        test = "np.isnan" if np.isnan(odd) else "~np.isfinite"
        holds = f"{test}(RESULT[{where.tolist()!r}].astype(np.float64)).all()"
        t.fail(f"{what} does not show the {odd} that it is computed from", y, holds)


def _mixed(t: Trial, p: Problem) -> None:
    which = p.at[0] % len(p.adapters)
    y = t.forward_mixed(p.x, p.W, _with(p, which), p.rows, p.bias)
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, p.rows, p.bias)
    mine, others = np.flatnonzero(p.rows == which), np.flatnonzero(p.rows != which)
    off = allowed.at(allowed.mixed(t, p), others)
    what = f"rows of others than adapter {which}, whose A has {p.odd},"
    t.expect(what, y, want[others], off, at=others)
    _shown(t, f"y of the rows of adapter {which}", y, p.odd, mine)


def _mixed_fresh(t: Trial, p: Problem) -> None:
    """One adapter's B is zero, and its A has NaN: its rows are the base's."""
    which = p.at[0] % len(p.adapters)
    adapters = _with(p, which)
    A, B, s = adapters[which]
    adapters[which] = A, np.zeros_like(B), s
    y = t.forward_mixed(p.x, p.W, adapters, p.rows, p.bias)
    rows = np.where(p.rows == which, -1, p.rows)
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, rows, p.bias)
    t.expect(f"y where B of adapter {which} is zero", y, want, allowed.mixed(t, p, rows=rows))


def _stacked(t: Trial, p: Problem) -> None:
    which = p.at[0] % len(p.adapters)
    y = t.forward_stacked(p.x, p.W, _with(p, which), p.bias)
    want = oracle.forward(p.x, t.weight(p.W), p.adapters, p.bias)
    said = f"y of stacked adapters, with {p.odd} in A of adapter {which},"
    off = allowed.stacked(t, p)
    reaches(t, said, y, (ALL, ALL), p.odd, want, off, (y, None))


def _dropped(t: Trial, p: Problem) -> None:
    """NaN in a row of x: that row of y shows it, others are as without, dropped or not."""
    x, (m, k) = p.x.copy(), p.x.shape
    i = p.at[0] % m
    x[i, p.at[1] % k] = p.odd
    clean = t.dropout_forward(p.x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
    y = t.dropout_forward(x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
    others = np.delete(np.arange(m), i)
    twice = 2 * np.asarray(allowed.forward(t, p.replaced(bias=None, scale=2 * p.scale)))
    off = twice if twice.ndim == 0 else twice[others]
    said = f"rows other than {i} of y with dropout, where x has {p.odd},"
    t.expect(said, y, clean[others], off, at=others)
    _shown(t, f"row {i} of y with dropout", y, p.odd, np.array([i]))


def _dropped_backward(t: Trial, p: Problem) -> None:
    """NaN in a row of dy: that row of dx, all of dA and a row of dB show it, other rows do not."""
    dy, (m, d) = p.dy.copy(), p.dy.shape
    i, j = p.at[0] % m, p.at[1] % d
    dy[i, j] = p.odd
    clean = t.dropout_backward(p.dy, p.x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
    got = t.dropout_backward(dy, p.x, p.W, p.A, p.B, p.scale, 0.5, p.seed)
    others, rows = np.delete(np.arange(m), i), np.delete(np.arange(d), j)
    limits = allowed.backward(t, p.replaced(scale=2 * p.scale))
    said = f"with dropout and {p.odd} in dy[{i}, {j}]"
    off = 2 * np.asarray(allowed.at(limits[0], others))
    t.expect(f"rows of dx other than {i} {said}", got[0], clean[0][others], off, at=others)
    off = 2 * np.asarray(allowed.at(limits[2], rows))
    t.expect(f"rows of dB other than {j} {said}", got[2], clean[2][rows], off, at=rows)
    _shown(t, f"row {i} of dx {said}", got[0], p.odd, np.array([i]))
    _shown(t, f"row {j} of dB {said}", got[2], p.odd, np.array([j]))


def _uncounted(t: Trial, p: Problem) -> None:
    """Targets of rows that are not counted are NaN or infinite."""
    counted = np.arange(len(p.x)) % 2 == p.at[0] % 2
    if not counted.any():
        counted[:] = True
    given = [(p.x, p.dy, counted), (p.x[:1], p.dy[:1], np.ones(1, bool))]

    def gradients(filler: float) -> Any:
        batches = [(x, np.where(c[:, None], y, y.dtype.type(filler)), c) for x, y, c in given]
        return t.loss_gradients(batches, p.W, p.A, p.B, p.scale)

    want, got = gradients(0.0), gradients(p.odd)
    for i, name in enumerate(("dA", "dB")):
        said = f"{name}, where targets that are not counted are {p.odd},"
        t.expect(said, got[i], want[i], 2.0**-6 * np.abs(want[i].astype(np.float64)))


def _spans(shape: Any, at: int) -> tuple[int, int, int]:
    """The first row of a sequence, the row `at` of it, and its end."""
    starts = np.concatenate([[0], np.cumsum(shape.lengths)])
    row = at % int(starts[-1])
    n = int(np.searchsorted(starts, row, side="right")) - 1
    return int(starts[n]), row, int(starts[n + 1])


def _attention(t: Trial, p: Problem) -> None:
    first, row, end = _spans(p.shape, p.at[0])
    x = p.x.copy()
    x[row, p.at[1] % x.shape[1]] = p.odd
    y = t.attention(x, p.weights, p.adapters, p.shape)
    others = np.concatenate([np.arange(row), np.arange(end, len(x))])
    block = Block({n: t.weight(W) for n, W in p.weights.items()}, p.adapters, p.shape, t.precision)
    want = block.forward(p.x)
    twice = 2.0 if p.x.dtype == np.float64 else 1.0 + 2.0**-20
    said = f"rows that do not see token {row}, where x has {p.odd},"
    t.expect(said, y, want.value[others], twice * want.error[others], at=others)
    # Of an infinity a score may be -inf, whose share is rightly zero: it must show in its own row.
    seen = np.arange(row, end) if np.isnan(p.odd) else np.array([row])
    _shown(t, f"y of rows {seen.tolist()} of attention", y, p.odd, seen)


def _attention_backward(t: Trial, p: Problem) -> None:
    first, row, end = _spans(p.shape, p.at[0])
    dy = p.dy.copy()
    dy[row, p.at[1] % dy.shape[1]] = p.odd
    clean, _ = t.attention_backward(p.dy, p.x, p.weights, p.adapters, p.shape)
    dx, _ = t.attention_backward(dy, p.x, p.weights, p.adapters, p.shape)
    others = np.concatenate([np.arange(first), np.arange(row + 1, len(dy))])
    block = Block({n: t.weight(W) for n, W in p.weights.items()}, p.adapters, p.shape, t.precision)
    block.forward(p.x)
    off = 4 * block.backward(p.dy)[0].error[others]
    said = f"rows of dx that token {row}, where dy has {p.odd}, does not see"
    t.expect(said, dx, clean[others], off, at=others)
    if np.isnan(p.odd):
        _shown(t, "dx of the tokens that it sees", dx, p.odd, np.arange(first, row + 1))


def _exact(dtype: str = "float32") -> Any:
    return poisoned("x")(dtype)


def _blocks(dtype: str = "float32") -> Any:
    return _odd(attention_problems(dtype))


def _law(id: str, needs: tuple[str, ...], problems: Any, check: Any, *said: str) -> Law:
    sentence, maths, violation, *spec = said
    return Law(id, sentence, maths, violation, tuple(spec), needs, problems, check, (), DTYPES)


LAWS = (
    Law(
        "V19",
        "NaN in a weight that shares a scale takes its group at most, and shows.",
        "W[i,j] = NaN or ±inf: column i of y is not finite, other columns as without; in "
        "8 and 4 bits "
        "what is stored of other groups of 32 has the same bits",
        "one scale for a whole matrix or for several rows, or NaN stored as a code like others",
        ("V-11", "V-1", "N-7"),
        ("forward", "stored"),
        _grouped_weights,
        _in_its_group,
        ("x",),
        dtypes=DTYPES,
    ),
    _law(
        "V11", ("forward_mixed",), several, _mixed,
        "In a mixed batch NaN in an adapter shows in the rows that use it, and in no others.",
        "NaN or ±inf in an A: rows that use it are NaN, or not finite; others exact",
        "products with all adapters are masked by zeros, or NaN is cleaned away",
        "V-8", "X-3", "N-5",
    ),
    _law(
        "V12", ("forward_mixed", "bitwise"), several, _mixed_fresh,
        "In a mixed batch an adapter whose B is zero is left out, whatever the others hold.",
        "B = 0 and NaN in A of one adapter: its rows are the base's, others exact",
        "whether B is zero is asked of all adapters at once, or of the first",
        "V-8", "V-4", "F-2",
    ),
    _law(
        "V13", ("forward_stacked",), several, _stacked,
        "Of stacked adapters NaN in one shows in y.",
        "NaN or ±inf in an A: no element of y is finite",
        "NaN in one of several adapters is passed over",
        "V-1", "X-1", "N-5",
    ),
    _law(
        "V14", ("dropout_forward",), _exact, _dropped,
        "With dropout NaN in a token shows in its row, and in no other.",
        "x[i,j] = NaN or ±inf: row i of y is NaN, or not finite; others as without",
        "the mask is multiplied over rows, or NaN is dropped from the base's path too",
        "V-7", "V-1", "F-7",
    ),
    _law(
        "V15", ("dropout_backward",), _exact, _dropped_backward,
        "With dropout NaN in dy shows in the gradients that read it, and in no others.",
        "dy[i,j] = NaN or ±inf: row i of dx and row j of dB show it, other rows as without",
        "gradients are cleaned in training, where there is dropout, alone",
        "V-1", "D-3", "B-7",
    ),
    _law(
        "V16", ("loss_gradients",), _exact, _uncounted,
        "What stands for the target of a row that is not counted does not matter.",
        "NaN or ±inf for such targets: dA and dB as with zeros there",
        "what is not counted is multiplied by zero in place of being left out",
        "V-10", "O-2",
    ),
    _law(
        "V17", ("attention",), _blocks, _attention,
        "In attention NaN reaches the tokens that see it, and no others.",
        "x[t] has NaN: rows from t to the end of its sequence are NaN; earlier ones and other "
        "sequences stay within A1's bound",
        "masked scores are added to or multiplied: -inf + NaN, 0 · NaN; or NaN is cleaned away",
        "V-9", "A-7", "N-5",
    ),
    _law(
        "V18", ("attention_backward",), _blocks, _attention_backward,
        "In attention's backward pass NaN reaches the tokens that were seen, and no others.",
        "dy[t] has NaN: dx of the sequence up to t is NaN; later ones and other sequences stay "
        "within A2's bound",
        "as V17, on the way back",
        "V-9", "A-7", "N-5",
    ),
)  # fmt: skip
