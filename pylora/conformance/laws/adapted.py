"""Laws of the gradients of a mixed batch, and of a bias of B (`lora_bias`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.bounds import adapted as bounds
from pylora.conformance.bounds import layer
from pylora.conformance.laws import oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.adapted import (
    ALL_DTYPES,
    beyond_biases,
    beyond_mixed,
    biased,
    exact_biased,
    exact_mixed,
    mixed_gradients,
)
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

EXACT = ("float32", "float64")


def _by_adapter(p: Problem) -> list[tuple[int, Array]]:
    """(adapter, its rows); -1 is the base."""
    return [(int(i), np.flatnonzero(p.rows == i)) for i in np.unique(p.rows)]


def _gradients(t: Trial, p: Problem, exact: bool = False) -> None:
    """dx of each row, dA and dB of each adapter's own rows; zeros of those that have none."""
    dx, grads = t.backward_mixed(p.dy, p.x, p.W, p.adapters, p.rows)
    W, nothing = t.weight(p.W), exact and t.exact
    for i, mine in _by_adapter(p):
        dy, x = p.dy[mine], p.x[mine]
        if i < 0:
            off = 0.0 if nothing else bounds.without_adapter(dy, W, t.precision)
            t.expect("dx of rows without adapter", dx, layer.wide(dy) @ layer.wide(W), off, at=mine)
            continue
        A, B, s = p.adapters[i]
        want = oracle.backward(dy, x, W, A, B, s)
        limits = layer.backward(dy, x, W, A, B, s, precision=t.precision)
        allowed: Any = (0.0, 0.0, 0.0) if nothing else limits
        t.expect(f"dx of the rows of adapter {i}", dx, want[0], allowed[0], at=mine)
        for j, name in enumerate(("dA", "dB")):
            what = f"{name} of adapter {i}, which {len(mine)} rows use"
            t.expect(what, grads, want[1 + j], allowed[1 + j], item=(i, j))
    for i in set(range(len(p.adapters))) - {int(i) for i in p.rows}:
        for j, name in enumerate(("dA", "dB")):
            what = f"{name} of adapter {i}, which no row uses"
            t.expect(what, grads, np.zeros(p.adapters[i][j].shape), item=(i, j))


def _gradients_exact(t: Trial, p: Problem) -> None:
    _gradients(t, p, exact=True)


def _neighbours(t: Trial, p: Problem) -> None:
    """NaN in dy, x and an adapter of other rows: nothing of it reaches this adapter or its rows."""
    if not p.adapters or not len(p.rows):
        return
    rng = np.random.default_rng(p.seed)
    chosen = int(p.rows[int(rng.integers(len(p.rows)))])
    mine = np.flatnonzero(p.rows == chosen)
    others = (p.rows != chosen)[:, None]
    nan = p.x.dtype.type(np.nan)
    dy, x = np.where(others, nan, p.dy), np.where(others, nan, p.x)
    adapters = [
        (A, B, s) if i == chosen else (np.full_like(A, nan), np.full_like(B, nan), s)
        for i, (A, B, s) in enumerate(p.adapters)
    ]
    dx, grads = t.backward_mixed(dy, x, p.W, adapters, p.rows)
    W = t.weight(p.W)
    if chosen < 0:
        off = 0.0 if t.exact else bounds.without_adapter(p.dy[mine], W, t.precision)
        want = layer.wide(p.dy[mine]) @ layer.wide(W)
        t.expect("dx of rows without adapter, NaN in all others", dx, want, off, at=mine)
        return
    A, B, s = p.adapters[chosen]
    wants = oracle.backward(p.dy[mine], p.x[mine], W, A, B, s)
    limits: Any = layer.backward(p.dy[mine], p.x[mine], W, A, B, s, precision=t.precision)
    limits = (0.0, 0.0, 0.0) if t.exact else limits
    what = f"of adapter {chosen}, NaN in all other rows and adapters"
    t.expect(f"dx {what}", dx, wants[0], limits[0], at=mine)
    t.expect(f"dA {what}", grads, wants[1], limits[1], item=(chosen, 0))
    t.expect(f"dB {what}", grads, wants[2], limits[2], item=(chosen, 1))


def _order(t: Trial, p: Problem) -> None:
    """Rows in another order: the same gradients, and dx in that order."""
    order = np.random.default_rng(p.seed).permutation(len(p.rows))
    dx, grads = t.backward_mixed(p.dy, p.x, p.W, p.adapters, p.rows)
    turned = t.backward_mixed(p.dy[order], p.x[order], p.W, p.adapters, p.rows[order])
    off = 0.0 if t.exact else np.inf  # what is not exact is asked of B20
    t.expect("dx of rows in another order", turned[0], dx[order], off)
    for i in range(len(p.adapters)):
        for j, name in enumerate(("dA", "dB")):
            what = f"{name} of adapter {i}, rows in another order"
            t.expect(what, turned[1], grads[i][j], off, item=(i, j))


_NAMES_NONE = (0, 1, 5, 2**31 - 1, 2**32 - 1, 2**62)  # beyond the last adapter, or before -1


def _bad_index(t: Trial, p: Problem) -> None:
    if not len(p.rows):
        return
    rows, past = p.rows.copy(), _NAMES_NONE[p.seed % len(_NAMES_NONE)]
    bad = len(p.adapters) + past if p.seed % 2 else -2 - past
    rows[(p.seed // 16) % len(rows)] = bad
    why = f"rows = {rows.tolist()} with {len(p.adapters)} adapters"
    for method, arguments in (
        ("backward_mixed", (p.dy, p.x, p.W, p.adapters, rows)),
        ("forward_mixed", (p.x, p.W, p.adapters, rows, p.bias)),
    ):
        if callable(getattr(t.implementation, method, None)):
            t.must_raise(why, method, *arguments)


# ---- lora_bias -----------------------------------------------------------------------------------


def _with_biases(p: Problem) -> list[tuple[Array, Array, Array | None, float]]:
    return [(A, B, more, s) for (A, B, s), more in zip(p.adapters, p.biases)]


def _scaled_bias(more: Array | None, scale: float) -> Any:
    return 0.0 if more is None else float(scale) * layer.wide(more)


def _bias_forward(t: Trial, p: Problem, exact: bool = False) -> None:
    y = t.bias_forward(p.x, p.W, p.A, p.B, p.bias_B, p.scale, p.bias)
    W = t.weight(p.W)
    want = oracle.forward(p.x, W, [(p.A, p.B, p.scale)], p.bias) + _scaled_bias(p.bias_B, p.scale)
    off = bounds.biased(p.x, W, [(p.A, p.B, p.bias_B, p.scale)], p.bias, t.precision)
    t.expect("y", y, want, 0.0 if exact and t.exact else off)


def _bias_forward_exact(t: Trial, p: Problem) -> None:
    _bias_forward(t, p, exact=True)


def _bias_backward(t: Trial, p: Problem, exact: bool = False) -> None:
    got = t.bias_backward(p.dy, p.x, p.W, p.A, p.B, p.bias_B, p.scale)
    W = t.weight(p.W)
    want = [*oracle.backward(p.dy, p.x, W, p.A, p.B, p.scale)]
    want.append(float(p.scale) * layer.wide(p.dy).sum(axis=0))
    limits = [*layer.backward(p.dy, p.x, W, p.A, p.B, p.scale, precision=t.precision)]
    limits.append(bounds.bias_gradient(p.dy, p.scale))
    for name, g, w, off in zip(("dx", "dA", "dB", "dbias_B"), got, want, limits):
        t.expect(name, g, w, 0.0 if exact and t.exact else off)


def _bias_backward_exact(t: Trial, p: Problem) -> None:
    _bias_backward(t, p, exact=True)


def _bias_mixed(t: Trial, p: Problem) -> None:
    y = t.bias_mixed(p.x, p.W, _with_biases(p), p.rows, p.bias)
    W = t.weight(p.W)
    for i, mine in _by_adapter(p):
        adapters = _with_biases(p)[i : i + 1] if i >= 0 else []
        x = p.x[mine]
        want = oracle.forward(x, W, [(A, B, s) for A, B, _, s in adapters], p.bias)
        want = want + sum(_scaled_bias(more, s) for _, _, more, s in adapters)
        off = bounds.biased(x, W, adapters, p.bias, t.precision)
        who = f"of adapter {i}" if i >= 0 else "without adapter"
        t.expect(f"y of the rows {who}", y, want, off, at=mine)


def _bias_stacked(t: Trial, p: Problem) -> None:
    adapters = _with_biases(p)
    y = t.bias_stacked(p.x, p.W, adapters, p.bias)
    W = t.weight(p.W)
    want = oracle.forward(p.x, W, p.adapters, p.bias)
    want = want + sum(_scaled_bias(more, s) for _, _, more, s in adapters)
    t.expect("y", y, want, bounds.biased(p.x, W, adapters, p.bias, t.precision))


def _bias_merge(t: Trial, p: Problem) -> None:
    W, bias = t.bias_merge(p.W, p.bias, p.A, p.B, p.bias_B, p.scale)
    want = oracle.merged(p.W, p.A, p.B, p.scale)
    t.expect("W'", W, want, layer.merged(p.W, p.A, p.B, p.scale))
    own = 0.0 if p.bias is None else layer.wide(p.bias)
    off = bounds.merged_bias(p.bias, p.bias_B, p.scale)
    t.expect("bias'", bias, own + _scaled_bias(p.bias_B, p.scale), off)


def _bias_merge_is_the_adapter(t: Trial, p: Problem) -> None:
    W, bias = t.bias_merge(p.W, p.bias, p.A, p.B, p.bias_B, p.scale)
    merged = t.bias_forward(p.x, W, np.zeros_like(p.A), np.zeros_like(p.B), p.bias_B * 0, 1.0, bias)
    apart = t.bias_forward(p.x, p.W, p.A, p.B, p.bias_B, p.scale, p.bias)
    t.expect("y of the merged module against the adapter's", merged, apart)


LAWS = (
    Law(
        "B20",
        "In a mixed batch each adapter's gradient is that of its own rows.",
        "dA = s (dy B)ᵀ x, dB = s dyᵀ (x Aᵀ) over the rows that use it, wherever they lie; dx of "
        "each row with its own adapter; zeros of an adapter without rows; within B1's bound",
        "rows of the next segment are added, only the last segment counts, or memory is left over",
        ("B-9", "B-1", "X-3", "S-3"),
        ("backward_mixed",),
        mixed_gradients,
        _gradients,
        ("dy", "x", "W"),
        dtypes=ALL_DTYPES,
        covering=beyond_mixed,
    ),
    Law(
        "B21",
        "Gradients of mixed batches are exact on small integers.",
        "as B20, with equality",
        "as B20, where the wrong part is small",
        ("B-9", "B-1"),
        ("backward_mixed",),
        exact_mixed,
        _gradients_exact,
        ("dy", "x", "W"),
        dtypes=EXACT,
    ),
    Law(
        "B22",
        "NaN in other rows and adapters reaches no gradient of this one.",
        "dA, dB of adapter a and dx of its rows are as before when dy, x, A and B of all others "
        "are NaN, exact",
        "products over all rows are masked afterwards: 0 · NaN is NaN",
        ("B-10", "B-7"),
        ("backward_mixed",),
        exact_mixed,
        _neighbours,
        ("W",),
        dtypes=EXACT,
    ),
    Law(
        "B23",
        "The order of rows in a mixed batch does not matter to the gradients.",
        "dx(π) = dx[π], dA(π) = dA, dB(π) = dB, exact",
        "rows are sorted and not put back, or an adapter that comes back replaces itself",
        ("B-9", "B-8"),
        ("backward_mixed",),
        exact_mixed,
        _order,
        ("dy", "x", "W"),
        dtypes=EXACT,
    ),
    Law(
        "B24",
        "A row that names no adapter is an error, also below -1 and beyond 32 bits.",
        "rows[i] >= number of adapters, and rows[i] < -1, must raise, forward and backward",
        "a negative index counts from the end, or is cut to 32 bits and names another adapter",
        ("X-4",),
        ("backward_mixed", "float32"),
        exact_mixed,
        _bad_index,
        (),
    ),
    Law(
        "X20",
        "A bias of B is scaled and added once.",
        "y = x Wᵀ + bias + s (x Aᵀ Bᵀ + bias_B), within F1's bound; also where B = 0",
        "bias_B is not scaled, scaled twice, scales the base's bias too, or is lost where B = 0",
        ("F-4", "F-3", "N-1"),
        ("bias_forward",),
        biased,
        _bias_forward,
        ("x", "W", "A", "B", "bias_B"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "X21",
        "Biases of B are exact on small integers.",
        "as X20, with equality",
        "as X20",
        ("F-4",),
        ("bias_forward",),
        exact_biased,
        _bias_forward_exact,
        ("x", "W", "A", "B", "bias_B"),
        dtypes=EXACT,
    ),
    Law(
        "X22",
        "In a mixed batch a row gets its own adapter's bias.",
        "y[i] = x[i] Wᵀ + bias + s (x[i] Aᵀ Bᵀ + bias_B) of adapter rows[i]; some have none",
        "a bias goes to all rows, to the next segment's, or is the first adapter's",
        ("X-6", "F-4"),
        ("bias_mixed",),
        mixed_gradients,
        _bias_mixed,
        ("x", "W", "bias"),
        dtypes=ALL_DTYPES,
        covering=beyond_mixed,
    ),
    Law(
        "X23",
        "Adapters that are active at once add up their biases.",
        "y = x Wᵀ + bias + Σ sᵢ (x Aᵢᵀ Bᵢᵀ + biasᵢ)",
        "one scale for all biases, or only the last one's",
        ("X-6", "X-1", "F-4"),
        ("bias_stacked",),
        mixed_gradients,
        _bias_stacked,
        ("x", "W", "bias"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "B25",
        "The gradient of a bias of B is the scaled sum of the rows of dy.",
        "dbias_B = s Σ dy[i]; dx, dA and dB as without it, within B1's bound",
        "a mean in place of a sum, no scale, or h's bias in dB",
        ("B-5", "B-1"),
        ("bias_backward",),
        biased,
        _bias_backward,
        ("dy", "x", "W", "A", "B"),
        dtypes=ALL_DTYPES,
        covering=beyond_biases,
    ),
    Law(
        "B26",
        "Gradients of biases of B are exact on small integers.",
        "as B25, with equality",
        "as B25",
        ("B-5",),
        ("bias_backward",),
        exact_biased,
        _bias_backward_exact,
        ("dy", "x", "W", "A", "B"),
        dtypes=EXACT,
    ),
    Law(
        "M20",
        "A bias of B is merged into the module's bias.",
        "W' = W + s B A, bias' = bias + s bias_B; where the base has no bias, bias' = s bias_B",
        "the bias is left out, not scaled, or put in the weight",
        ("M-4", "M-1", "F-4"),
        ("bias_merge",),
        biased,
        _bias_merge,
        ("W", "A", "B", "bias_B"),
        dtypes=ALL_DTYPES,
    ),
    Law(
        "M21",
        "A module merged with its bias gives the adapter's output.",
        "y(W', bias', no adapter) = y(W, bias, adapter), exact on small integers",
        "merge and adapter disagree about the bias",
        ("M-2", "M-4"),
        ("bias_merge", "bias_forward"),
        exact_biased,
        _bias_merge_is_the_adapter,
        ("x", "W", "A", "B", "bias_B"),
        dtypes=EXACT,
    ),
)
