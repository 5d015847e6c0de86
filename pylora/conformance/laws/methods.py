"""Laws of every method alike: one after any other, several at the same time, and arrays that come
where others were freed.

`cases` says how each is called. What comes of it is the method's own affair here: it must be the
same each time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import (
    DTYPES,
    attention_problems,
    exact_problems,
    integer_array,
    st,
)
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Broken, Problem, Trial
from pylora.types import Array

Case = tuple[str, tuple[Any, ...]]
TIMES = 6  # that each thread calls
FREED = 24  # arrays that come and go


def cases(p: Problem) -> list[Case]:
    """A call of each method that takes arrays, with this problem's."""
    x, W, A, B, s = p.x, p.W, p.A, p.B, p.scale
    m, several = len(x), [(A, B, s), (-A, B, 2 * s)]
    rows = (np.arange(m) + p.seed) % 3 - 1
    counted = np.arange(m) % 3 != 1
    q, loras = p.block, p.block.adapters
    return [
        ("forward", (x, W, A, B, s, p.bias)),
        ("base", (x, W, p.bias)),
        ("backward", (p.dy, x, W, A, B, s)),
        ("merge", (W, A, B, s)),
        ("forward_stacked", (x, W, several, p.bias)),
        ("forward_mixed", (x, W, several, rows.astype(np.int64), p.bias)),
        ("dropout_forward", (x, W, A, B, s, 0.5, p.seed)),
        ("dropout_backward", (p.dy, x, W, A, B, s, 0.5, p.seed)),
        ("loss_gradients", ([(x, p.dy, counted), (x[:1], p.dy[:1], counted[:1])], W, A, B, s)),
        ("init", (*W.shape, A.shape[0], p.seed, "kaiming")),
        ("attention", (q.x, q.weights, loras, q.shape)),
        ("attention_backward", (q.dy, q.x, q.weights, loras, q.shape)),
    ]


def leaves(value: Any) -> Iterator[Array]:
    """The arrays of a result; a state is the implementation's own affair."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from leaves(v)
    elif isinstance(value, dict):
        for name in sorted(value):
            yield from leaves(value[name])


def problems(dtype: str = "float32") -> Any:
    """Two problems, of one shape or of two, with an attention block each; which methods to call."""

    def both(p: Problem, q: Problem, block: Problem, more: Problem, same: bool, pair: Any) -> Any:
        first, second = p.replaced(block=block), q.replaced(block=more)
        if same:
            rng = np.random.default_rng(q.seed)
            fields = {n: integer_array(rng, getattr(p, n).shape, dtype=dtype) for n in NAMES}
            second = p.replaced(**fields, block=block, seed=q.seed, scale=q.scale)
        return Problem(first=first, second=second, methods=pair)

    one = exact_problems(dtype, tokens=(1, 2, 3, 5), features=(1, 3, 16, 33), ranks=(1, 2, 8))
    block, which = attention_problems(dtype), st.integers(0, len(METHODS) - 1)
    return st.builds(both, one, one, block, block, st.booleans(), st.tuples(which, which))


NAMES = ("x", "dy", "W", "A", "B")
METHODS = (
    "forward", "base", "backward", "merge", "forward_stacked", "forward_mixed", "dropout_forward",
    "dropout_backward", "loss_gradients", "init", "attention", "attention_backward",
)  # fmt: skip


def _pairs(own: bool) -> Any:
    """Each method with itself, of one shape and of two, and, unless only `own`, with each other
    one; as a function of dtype and examples."""

    def covering(dtype: str, examples: int) -> Iterator[Problem]:
        if dtype != "float32":
            return
        rng = np.random.default_rng(1)
        one, two = (_layer(rng, m, d, r) for m, d, r in ((3, 4, 2), (5, 3, 1)))
        again = _layer(rng, 3, 4, 2).replaced(block=one.block, scale=2.0, seed=8)
        for i in range(len(METHODS)):
            yield Problem(first=one, second=again, methods=(i, i))
            yield Problem(first=two, second=one, methods=(i, i))
            for j in range(len(METHODS)):
                if i != j and not own:
                    yield Problem(first=one, second=again, methods=(i, j))

    return covering


def _layer(rng: np.random.Generator, m: int, d: int, r: int) -> Problem:
    """A problem of these sizes, with an attention block."""
    shapes = {"x": (m, 3), "dy": (m, d), "W": (d, 3), "A": (r, 3), "B": (d, r), "bias": (d,)}
    arrays = {n: rng.integers(1, 4, s).astype(np.float32) for n, s in shapes.items()}
    shape = AttentionShape(2, 1, 2, (m - 1, 1))
    sizes = {"q_proj": (4, 3), "k_proj": (2, 3), "v_proj": (2, 3), "o_proj": (3, 4)}
    weights = {n: rng.normal(size=s).astype(np.float32) for n, s in sizes.items()}
    low = [rng.normal(size=s).astype(np.float32) for s in ((m, 3), (m, 3), (2, 3), (4, 2))]
    block = Problem(
        x=low[0],
        dy=low[1],
        weights=weights,
        adapters={"q_proj": (low[2], low[3], 2.0)},
        shape=shape,
    )
    return Problem(**arrays, scale=1.0, seed=m, block=block)


def _chosen(t: Trial, p: Problem) -> tuple[Case, Case]:
    """A case of each of both problems, of methods that there are."""
    has = [n for n in METHODS if callable(getattr(t.implementation, n, None))]
    names = [has[i % len(has)] for i in p.methods]
    first = next(c for c in cases(p.first) if c[0] == names[0])
    second = next(c for c in cases(p.second) if c[0] == names[1])
    return first, second


def _again(t: Trial, p: Problem) -> None:
    """f, g, f: the second f gives what the first gave, and the first keeps it."""
    (f, mine), (g, others) = _chosen(t, p)
    first = getattr(t, f)(*mine)
    before = [a.copy() for a in leaves(first)]
    getattr(t, g)(*others)
    for i, (a, want) in enumerate(zip(leaves(first), before)):
        t.expect(f"array {i} of {f}, after {g} was called,", a, want, signs=True)
    again = getattr(t, f)(*mine)
    for i, (a, want) in enumerate(zip(leaves(again), before)):
        t.expect(f"array {i} of {f}, once more after {g},", a, want, signs=True)


def _plainly(of: Any, method: str, given: Any) -> Any:
    return getattr(of, method)(*given)


def _together(t: Trial, p: Problem) -> None:
    together(t, _chosen(t, p), _plainly)


def together(t: Trial, pair: Any, invoke: Callable[[Any, str, Any], Any]) -> None:
    """Threads that make two calls (method, arguments) at once, and each what it gives alone."""
    alone = [[a.copy() for a in leaves(invoke(t, f, given))] for f, given in pair]
    calls = [(i, *pair[i]) for i in (0, 1, 0)]
    got: list[list[Array]] = [[] for _ in calls]
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def work(n: int) -> None:
        _, method, given = calls[n]
        try:
            start.wait(timeout=10)
            for _ in range(TIMES):
                got[n] += [a.copy() for a in leaves(invoke(t.implementation, method, given))]
        except Exception as error:  # reported below, in the caller's thread
            errors.append(error)
            start.abort()

    workers = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a race needs the other thread to come in between
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        said = f"{type(errors[0]).__name__}: {errors[0]}"
        raise Broken(f"{' and '.join(f for f, _ in pair)} at the same time raised {said}")
    for n, (i, method, _) in enumerate(calls):
        want = alone[i] * TIMES
        for a, w in zip(got[n], want):
            said = f"{method} while {pair[1 - i][0]} is called by another thread"
            t.expect(said, a, w, signs=True)


def _freed(t: Trial, p: Problem) -> None:
    """Arrays that come and go: one lies where another lay, and has the name that it had."""
    p, rng, call = p.first, np.random.default_rng(p.first.seed), t.implementation.forward
    for n in range(FREED):
        x, W, A, B = (integer_array(rng, getattr(p, a).shape, dtype=p.x.dtype) for a in "xWAB")
        y = np.array(call(x, W, A, B, p.scale))
        want = oracle.forward(x, t.weight(W), [(A, B, p.scale)])
        q = p.replaced(x=x, W=W, A=A, B=B, bias=None)
        t.expect(f"y of the {n + 1}th arrays, each freed before", y, want, allowed.forward(t, q))
        del x, W, A, B, q


LAWS = (
    Law(
        "C7",
        "A method gives the same before and after any other, and what it gave stays.",
        "f(a), g(b), f(a): both f(a) equal, for every two methods; the first array for array as "
        "it was given, bit for bit",
        "one method leaves in the object what another reads, or two share a buffer",
        ("C-1", "C-2", "N-3"),
        ("forward",),
        problems,
        _again,
        (),
        dtypes=DTYPES,
        covering=_pairs(own=False),
    ),
    Law(
        "C8",
        "Methods that are called by several threads at once give what each gives alone.",
        "three threads, two methods, the same shapes or others: equal to the result alone",
        "a race: a buffer, the adapter of a call or a seed lies in the object",
        ("C-6", "N-3"),
        ("forward", "thread_safe"),
        problems,
        _together,
        (),
        dtypes=DTYPES,
        covering=_pairs(own=True),
    ),
    Law(
        "C9",
        "An array that lies where another was freed is another array.",
        "y of 24 times new x, W, A and B, the former freed: each the oracle's, exact",
        "a cache is kept by the address of an array, or by its id, and outlives it",
        ("C-3",),
        ("forward",),
        problems,
        _freed,
        (),
        dtypes=DTYPES,
    ),
)
