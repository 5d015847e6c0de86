"""Makes the numbers of a counterexample simple, after hypothesis has made its shapes small.

Each array in turn: made contiguous, all ones, all zeros; then each element 0, 1, or rounded. A step
is kept if the law is still violated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pylora.conformance.testcase import Problem, Violation

MOST = 400  # attempts


def simpler(
    problem: Problem,
    violation: Violation,
    names: tuple[str, ...],
    check: Callable[[Problem], Violation | None],
) -> tuple[Problem, Violation]:
    """The problem with simpler numbers in the fields `names` that `check` still finds wrong."""
    left = MOST

    def better(candidate: Problem) -> bool:
        nonlocal problem, violation, left
        left -= 1
        found = check(candidate) if left >= 0 else None
        if found is None:
            return False
        problem, violation = candidate, found
        return True

    names = tuple(n for n in names if isinstance(vars(problem).get(n), np.ndarray))
    if vars(problem).get("bias") is not None and "bias" in names:
        better(problem.replaced(bias=None))
    if vars(problem).get("scale") not in (None, 1.0) and "scale" in vars(problem):
        better(problem.replaced(scale=1.0))
    for name in names:
        a = getattr(problem, name)
        if a is None:
            continue
        if not (a.flags.c_contiguous and a.flags.writeable):
            better(problem.replaced(**{name: np.array(a, order="C")}))
        for value in (0.0, 1.0):
            if not better(problem.replaced(**{name: np.full_like(a, value, order="C")})):
                continue
            break
    for name in names:
        a = getattr(problem, name)
        if a is None or a.size > 64:
            continue
        for at in np.ndindex(a.shape):
            for value in (0.0, 1.0, _short(float(a[at]))):
                now = getattr(problem, name)
                if float(now[at]) in (0.0, value):
                    break
                copy = np.array(now, order="K")
                copy[at] = value
                if better(problem.replaced(**{name: copy})):
                    break
    return problem, violation


def smallest(
    problem: Problem, violation: Violation, check: Callable[[Problem], Violation | None]
) -> tuple[Problem, Violation]:
    """Of a problem that was made large in one dimension, the smallest that `check` finds wrong, as
    far as halving the distance finds it: where a limit is, it ends just beyond."""
    resized, size = vars(problem).get("resized"), vars(problem).get("size", 0)
    if resized is None:
        return problem, violation
    right = 0
    while size - right > 1:
        middle = (size + right) // 2
        candidate = resized(middle)
        found = check(candidate)
        if found is None:
            right = middle
        else:
            problem, violation, size = candidate, found, middle
    return problem, violation


def _short(value: float) -> float:
    """To two significant digits."""
    return float(f"{value:.1e}") if np.isfinite(value) else value
