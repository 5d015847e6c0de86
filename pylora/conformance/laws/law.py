"""What a law is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pylora.conformance.testcase import Problem, Trial


@dataclass(frozen=True)
class Law:
    """One property that every correct implementation has.

    `check` gets a Trial (call it like the implementation) and a problem that `problems` drew. It
    returns if the law holds there, and raises Violation through the Trial if not.

    A law with `dtypes` is run in each of them that the implementation takes: `problems(dtype)` is
    then called with each, and the examples are drawn from all of them in turn. One without is run
    in the dtype that it `needs`, and `problems()` is called without.

    `covering(dtype, examples)` are problems that no run leaves to luck: all are tried, before any
    is drawn, and more of them the more examples are asked for (see problems/sizes.py).
    """

    id: str
    sentence: str
    maths: str
    violation: str  # what is wrong in an implementation that breaks it
    spec: tuple[str, ...]  # statements of docs/spec.md
    needs: tuple[str, ...]  # capabilities; see protocol.capabilities
    problems: Callable[..., Any]  # a hypothesis strategy of Problem; see `dtypes`
    check: Callable[[Trial, Problem], None]
    simplify: tuple[str, ...] = ("x", "W", "A", "B", "dy", "bias")  # fields whose elements may be
    # replaced by simpler numbers in a counterexample without leaving what the law is about
    dtypes: tuple[str, ...] = ()
    covering: Callable[[str, int], Iterable[Problem]] | None = None
    cost: int = 1  # of one example, in those of an ordinary law: it is tried with so many fewer

    def share_of(self, examples: int) -> int:
        """How many examples of this law a run of so many is."""
        return max(1, examples // self.cost)
