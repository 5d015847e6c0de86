"""Laws of calls of all methods beyond the layer's own, one after another and at the same time: what
a result is hangs on the arguments of its call, and it belongs to the caller. See every.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.laws.every import METHODS, Args, compare, given, invoke, present
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.methods import together
from pylora.conformance.problems.every import DTYPES, KINDS, OPTIONS, arguments, leaves
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

SCRIPT = ("a", "b", "a", "write a", "a", "spoil", "c", "a", "b")


class _Calls:
    """The arguments of a method, in three forms, and every result that is kept."""

    def __init__(self, t: Trial, p: Problem) -> None:
        self.t, self.p, self.n = t, p, 0
        self.args: dict[tuple[str, str], Args] = {}
        self.kept: list[tuple[str, Any, Array]] = []

    def of(self, method: str, which: str) -> Args:
        """ "a" and "b" are of the same sizes; "c" has one dimension more of each."""
        if (method, which) not in self.args:
            sizes = KINDS[method].sizes
            larger = {n: size + 2 for n, size in sizes.items()} if which == "c" else {}
            seed = self.p.seed + 10 * "abc".index(which)
            self.args[method, which] = given(self.t, method, self.p.dtype, seed, **larger)
        return self.args[method, which]

    def call(self, method: str, which: str) -> None:
        self.n += 1
        args = self.of(method, which)
        got = invoke(self.t, method, args)
        for a in compare(self.t, f"in call {self.n}", method, args, got):
            what = f"the result of {method} in call {self.n} shares memory with"
            for (name, _), other in self.args.items():
                for _, b in leaves(other):
                    self.t.apart(f"{what} an argument of {name}", a, b)
            for said, b, _ in self.kept:
                self.t.apart(f"{what} {said}", a, b)
            self.kept.append((f"that of {method} in call {self.n}", a, np.array(a)))

    def write(self, method: str, which: str) -> None:
        """Other numbers in the same arrays: those of another seed."""
        other = arguments(method, self.p.dtype, self.p.seed + 50)
        for (_, a), (_, b) in zip(leaves(self.of(method, which)), leaves(other)):
            if a.dtype.kind not in "iub":
                a[...] = b

    def spoil(self) -> None:
        """The caller writes into the last result."""
        if self.kept and self.kept[-1][1].flags.writeable:
            _, a, _ = self.kept.pop()
            a[...] = 0 if a.dtype.kind in "iub" else np.nan

    def end(self) -> None:
        for said, a, before in self.kept:
            self.t.expect(f"{said}, looked at again after later calls", a, before, signs=True)


def _sequence(t: Trial, p: Problem) -> None:
    calls = _Calls(t, p)
    known = [m for m in p.methods if p.dtype in KINDS[m].dtypes]
    has = [m for m in known if callable(getattr(t.implementation, m, None))]
    if not has:
        raise NotTested(f"there is none of {', '.join(p.methods)}")
    for i, step in enumerate(p.steps):
        method = has[i % len(has)]
        if step == "spoil":
            calls.spoil()
        elif step.startswith("write"):
            calls.write(method, "a")
        else:
            calls.call(method, step)
    calls.end()


def _alone(dtype: str, examples: int) -> Iterator[Problem]:
    """Each method by itself, and beside the next one of the list."""
    for i, method in enumerate(METHODS if dtype == "float32" else ()):
        for seed in range(OPTIONS.get(method, 1)):
            yield Problem(dtype=dtype, seed=seed, methods=(method,), steps=SCRIPT)
        both = method, METHODS[(i + 1) % len(METHODS)]
        yield Problem(dtype=dtype, seed=5, methods=both, steps=("a", "a", "b", "b", "a", "a"))


def _some_calls(dtype: str) -> Any:
    steps = st.lists(pick(("a", "b", "c", "write a", "spoil")), min_size=3, max_size=8)
    return st.builds(
        lambda seed, methods, steps: Problem(
            dtype=dtype, seed=seed, methods=tuple(methods), steps=tuple(steps)
        ),
        st.integers(0, 99),
        st.lists(pick(METHODS), min_size=1, max_size=3),
        steps,
    )


def _threads(t: Trial, p: Problem) -> None:
    method = present(t, p)
    pair = [(method, given(t, method, p.dtype, seed)) for seed in (p.seed, p.seed + 1)]
    together(t, pair, invoke)


def _each_method(dtype: str, examples: int) -> Iterator[Problem]:
    for method in METHODS if dtype == "float32" else ():
        yield Problem(method=method, dtype=dtype, seed=6)


def _some_method(dtype: str) -> Any:
    return st.builds(
        lambda method, seed: Problem(method=method, dtype=dtype, seed=seed),
        pick(METHODS),
        st.integers(0, 99),
    )


LAWS = (
    Law(
        "C10",
        "A result of any other method is what its own arguments say, and stays so.",
        "calls in any order, of the same sizes and of others, arrays written to in "
        "place, results kept and overwritten: each the exact result, none shares memory with "
        "another or with an argument",
        "a table is cached by part of what it hangs on, a buffer is given away, or an argument is",
        ("C-1", "C-2", "C-3", "N-3"),
        ("forward",),
        _some_calls,
        _sequence,
        (),
        dtypes=DTYPES,
        covering=_alone,
    ),
    Law(
        "C11",
        "Any other method gives the same when threads call it at once.",
        "three threads, two sets of arguments of one shape: equal to the result alone, bit for bit",
        "a race: a buffer or a table of the object is written by every call",
        ("C-6", "N-3"),
        ("forward", "thread_safe"),
        _some_method,
        _threads,
        (),
        dtypes=("float32",),
        covering=_each_method,
        cost=4,
    ),
)
