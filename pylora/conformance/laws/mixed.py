"""Laws of several adapters: active at once, or one for each row; and of rows, repeats and threads.

The laws of bits hold for implementations that promise them (`bitwise = True`); for the others the
laws of bounds say what can be asked.
"""

from __future__ import annotations

import threading

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    exact_problems,
    integer_array,
    lora_problems,
    several_adapters,
    st,
)
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array

TAME = ("normal", "integers", "positive", "wide", "zeros")


def _exact_several(dtype: str) -> object:
    return several_adapters(dtype, exact=True)


# ---- all at once ---------------------------------------------------------------------------------


def _stacked(t: Trial, p: Problem) -> None:
    y = t.forward_stacked(p.x, p.W, p.adapters, p.bias)
    W = t.weight(p.W)
    bound = bounds.forward(p.x, W, p.adapters, p.bias, precision=t.precision)
    t.expect("y", y, oracle.forward(p.x, W, p.adapters, p.bias), bound)


def _stacked_exact(t: Trial, p: Problem) -> None:
    y = t.forward_stacked(p.x, p.W, p.adapters, p.bias)
    want, off = oracle.forward(p.x, t.weight(p.W), p.adapters, p.bias), allowed.stacked(t, p)
    t.expect("y", y, want, off)
    y = t.forward_stacked(p.x, p.W, p.adapters[::-1], p.bias)
    t.expect("y, adapters reversed", y, want, off)


# ---- one for each row ----------------------------------------------------------------------------


def _mixed(t: Trial, p: Problem) -> None:
    y = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, p.rows, p.bias)
    t.expect("y", y, want, allowed.mixed_bound(t, p))


def _mixed_exact(t: Trial, p: Problem) -> None:
    y = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, p.rows, p.bias)
    t.expect("y", y, want, allowed.mixed(t, p))


def _mixed_alone(t: Trial, p: Problem) -> None:
    """Each row computed without the others."""
    y = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    off = _twice(t, p)
    for i, row in enumerate(p.rows):
        alone = t.forward_mixed(p.x[i : i + 1], p.W, p.adapters, p.rows[i : i + 1], p.bias)
        what = f"row {i} (adapter {int(row)}) in the batch against alone"
        t.expect(what, y, alone[0], allowed.at(off, i), at=i)


def _mixed_neighbours(t: Trial, p: Problem) -> None:
    """Other adapters and other rows are exchanged; the rows of one adapter must not notice."""
    if not len(p.rows) or not p.adapters:
        return
    rng = np.random.default_rng(p.seed)
    chosen = int(p.rows[int(rng.integers(len(p.rows)))])
    mine = np.flatnonzero(p.rows == chosen)
    before = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    x = np.where((p.rows == chosen)[:, None], p.x, integer_array(rng, p.x.shape, 2, p.x.dtype))
    changed = [
        (A, B, s)
        if i == chosen
        else (*(integer_array(rng, a.shape, dtype=a.dtype) for a in (A, B)), 2.0)
        for i, (A, B, s) in enumerate(p.adapters)
    ]
    after = t.forward_mixed(x, p.W, changed, p.rows, p.bias)
    off = allowed.at(_twice(t, p), mine)
    t.expect(f"rows of adapter {chosen}, all others changed", after, before[mine], off, at=mine)


def _mixed_order(t: Trial, p: Problem) -> None:
    order = np.random.default_rng(p.seed).permutation(len(p.rows))
    y = t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    turned = t.forward_mixed(p.x[order], p.W, p.adapters, p.rows[order], p.bias)
    t.expect("y of rows in another order", turned, y[order], allowed.at(_twice(t, p), order))


def _twice(t: Trial, p: Problem) -> allowed.Allowed:
    """What rows may differ by that are to be equal: nothing where bits are promised."""
    return 0.0 if t.bitwise else 2 * allowed.mixed(t, p)


def _mixed_nan(t: Trial, p: Problem) -> None:
    """NaN in a row, and in an adapter that some rows do not use, reaches no other row."""
    m, n = len(p.rows), len(p.adapters)
    if not m or not n:
        return
    rng = np.random.default_rng(p.seed)
    i, bad = int(rng.integers(m)), int(rng.integers(n))
    x = p.x.copy()
    x[i, int(rng.integers(x.shape[1]))] = np.nan
    A, B, s = p.adapters[bad]
    adapters = list(p.adapters)
    adapters[bad] = np.full_like(A, np.nan), B, s
    y = t.forward_mixed(x, p.W, adapters, p.rows, p.bias)
    clean = np.flatnonzero((np.arange(m) != i) & (p.rows != bad))
    want = oracle.mixed(p.x, t.weight(p.W), p.adapters, p.rows, p.bias)[clean]
    what = f"rows without NaN (x has it in row {i}, adapter {bad} in A)"
    t.expect(what, y, want, allowed.at(allowed.mixed(t, p), clean), at=clean)


def _mixed_bad_index(t: Trial, p: Problem) -> None:
    if not len(p.rows):
        return
    t.forward_mixed(p.x, p.W, p.adapters, p.rows, p.bias)
    rows = p.rows.copy()
    rows[p.seed % len(rows)] = len(p.adapters) + p.seed % 3
    why = f"rows = {rows.tolist()} with {len(p.adapters)} adapters"
    t.must_raise(why, "forward_mixed", p.x, p.W, p.adapters, rows, p.bias)


# ---- rows, repeats, threads ----------------------------------------------------------------------


def _forward(t: Trial, p: Problem, x: Array) -> Array:
    y: Array = t.forward(x, p.W, p.A, p.B, p.scale, p.bias)
    return y


def _row_alone(t: Trial, p: Problem) -> None:
    y = _forward(t, p, p.x)
    lora = [(p.A, p.B, p.scale)]
    bound = 2 * bounds.forward(p.x, t.weight(p.W), lora, p.bias, precision=t.precision)
    for i in range(p.x.shape[0]):
        alone = _forward(t, p, p.x[i : i + 1])
        t.expect(f"row {i} alone against in the batch", alone, y[i], bound[i], at=0)
        t.note("the same bits", alone[0].tobytes() == np.ascontiguousarray(y[i]).tobytes())


def _row_bits(t: Trial, p: Problem) -> None:
    y = _forward(t, p, p.x)
    other = p.x[::-1].copy() * p.x.dtype.type(3)
    for i in range(p.x.shape[0]):
        t.expect(f"row {i} alone", _forward(t, p, p.x[i : i + 1]), y[i], at=0, signs=True)
        x = other.copy()
        x[i] = p.x[i]
        t.expect(f"row {i}, neighbours changed", _forward(t, p, x), y[i], at=i, signs=True)


def _repeat(t: Trial, p: Problem) -> None:
    y = _forward(t, p, p.x).copy()
    _forward(t, p, p.x + p.x.dtype.type(1))
    again = _forward(t, p, p.x)
    t.expect("y of the same inputs a second time", again, y, signs=True)


def _threads(t: Trial, p: Problem) -> None:
    results = []
    for n in (1, 2, 3):
        t.set_num_threads(n)
        results.append(_forward(t, p, p.x))
        if callable(getattr(t.implementation, "backward", None)):
            results.extend(t.backward(p.dy, p.x, p.W, p.A, p.B, p.scale)[1:3])
    t.set_num_threads(1)
    each = len(results) // 3
    for n in (1, 2):
        for i in range(each):
            name = ("y", "dA", "dB")[i]
            got = results[n * each + i]
            t.expect(f"{name} with {n + 1} threads against one", got, results[i], signs=True)


def _concurrent(t: Trial, p: Problem) -> None:
    """Two threads call at once, each with its own x and adapter, a few times."""
    inputs = [(p.x, p.A, p.B), (p.x[::-1].copy(), p.A[:, ::-1].copy(), -p.B)]
    W = t.weight(p.W)
    want = [oracle.forward(x, W, [(A, B, p.scale)], p.bias) for x, A, B in inputs]
    off = [allowed.forward(t, p, x=x, A=A, B=B) for x, A, B in inputs]
    got: list[list[Array]] = [[], []]
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def work(i: int) -> None:
        try:
            start.wait(timeout=10)
            x, A, B = inputs[i]
            for _ in range(4):
                y = t.implementation.forward(x, p.W, A, B, p.scale, p.bias)
                got[i].append(np.array(y))
        except Exception as error:  # reported below, in the caller's thread
            errors.append(error)
            start.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise Broken(f"forward in two threads raised {type(errors[0]).__name__}: {errors[0]}")
    for i in range(2):
        for y in got[i]:
            t.expect(f"y of thread {i}, while another thread calls too", y, want[i], off[i])


LAWS = (
    Law(
        "X1",
        "Adapters that are active at once add up.",
        "y = x Wᵀ + bias + Σ sᵢ (x Aᵢᵀ) Bᵢᵀ within F1's bound with the sum of all ranks",
        "an adapter is lost, or one scale is used for all",
        ("X-1",),
        ("forward_stacked",),
        several_adapters,
        _stacked,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X2",
        "Adapters that are active at once add up exactly on small integers, in any order.",
        "as X1, with equality, also with the adapters reversed",
        "as X1; also an update that depends on the order of adapters",
        ("X-1", "X-2"),
        ("forward_stacked",),
        _exact_several,
        _stacked_exact,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X3",
        "In a mixed batch each row has its own adapter's result.",
        "y[i] = x[i] Wᵀ + bias + s (x[i] Aᵀ) Bᵀ of adapter rows[i], or base for -1, as in F1",
        "a row gets another row's adapter, or another adapter's scale",
        ("X-3",),
        ("forward_mixed",),
        several_adapters,
        _mixed,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X4",
        "Mixed batches are exact on small integers.",
        "as X3, with equality",
        "an adapter leaks into the next row or segment, at a boundary or where ranks differ",
        ("X-3",),
        ("forward_mixed",),
        _exact_several,
        _mixed_exact,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X5",
        "A row of a mixed batch is what it is alone.",
        "y(x; rows)[i] = y(x[i]; rows[i]), exact on small integers",
        "as X4, shown without an oracle",
        ("X-3", "N-4"),
        ("forward_mixed",),
        _exact_several,
        _mixed_alone,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X6",
        "What other rows and other adapters hold does not matter to a row.",
        "rows of adapter a keep their values when all other rows and adapters change, exact",
        "one user's adapter or prompt changes another user's answer",
        ("X-3",),
        ("forward_mixed",),
        _exact_several,
        _mixed_neighbours,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X7",
        "The order of rows in a mixed batch does not matter.",
        "y(x[π]; rows[π]) = y(x; rows)[π], exact",
        "rows are sorted by adapter and not put back",
        ("X-3",),
        ("forward_mixed",),
        _exact_several,
        _mixed_order,
        ("x", "W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X8",
        "NaN in a row or in an adapter reaches only the rows that use it.",
        "y[l] is as without NaN for every l whose x and adapter have none",
        "products with all adapters are masked afterwards: 0 · NaN is NaN",
        ("X-3", "F-7"),
        ("forward_mixed",),
        _exact_several,
        _mixed_nan,
        ("W", "bias"),
        dtypes=DTYPES,
    ),
    Law(
        "X9",
        "A row index that names no adapter is an error.",
        "rows[i] >= number of adapters must raise",
        "memory beyond the adapters is read, or the row silently gets the base",
        ("X-4",),
        ("forward_mixed",),
        _exact_several,
        _mixed_bad_index,
        (),
        dtypes=DTYPES,
    ),
    Law(
        "N3",
        "A row alone is the row of the batch, within rounding.",
        "|y(x[i]) - y(x)[i]| <= twice F1's bound; whether the bits are equal is reported",
        "rows influence each other",
        ("F-7", "N-4"),
        ("forward",),
        lambda dtype: lora_problems(dtype, tokens=(2, 3, 5, 1), kinds=TAME),
        _row_alone,
        dtypes=DTYPES,
    ),
    Law(
        "N4",
        "The bits of a row depend on that row alone.",
        "y(x[i]) has the bits of y(x)[i], whatever the batch size and the neighbours",
        "an answer changes with the load of the server",
        ("N-4",),
        ("forward", "bitwise"),
        lambda dtype: lora_problems(dtype, tokens=(2, 3, 5, 1), kinds=TAME),
        _row_bits,
        dtypes=DTYPES,
    ),
    Law(
        "N5",
        "The same inputs give the same bits each time.",
        "y(x) has the bits of y(x) after another call",
        "a result depends on history or on chance",
        ("N-3",),
        ("forward", "bitwise"),
        lambda dtype: lora_problems(dtype, kinds=TAME),
        _repeat,
        dtypes=DTYPES,
    ),
    Law(
        "N6",
        "The number of threads does not change a bit.",
        "y, dA and dB with 2 and 3 threads have the bits of those with 1",
        "a race, or an order of summation that depends on how work is split",
        ("N-3",),
        ("forward", "set_num_threads", "bitwise"),
        lambda dtype: st.one_of(
            lora_problems(dtype, kinds=TAME),
            lora_problems(dtype, tokens=(33, 64), features=(64, 130), ranks=(8, 17), kinds=TAME),
        ),
        _threads,
        dtypes=DTYPES,
    ),
    Law(
        "N7",
        "Two threads that call at once do not disturb each other.",
        "each thread's y is exact on small integers",
        "a race: scratch memory or state is shared between calls",
        ("N-3",),
        ("forward", "thread_safe"),
        lambda dtype: exact_problems(dtype, tokens=(2, 3, 5, 16), features=(1, 3, 16, 33, 64)),
        _concurrent,
        dtypes=DTYPES,
    ),
)
