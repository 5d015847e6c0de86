"""What a law is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pylora.conformance.testcase import Problem, Trial


@dataclass(frozen=True)
class Law:
    """One property that every correct implementation has.

    `check` gets a Trial (call it like the implementation) and a problem that `problems` drew. It
    returns if the law holds there, and raises Violation through the Trial if not.
    """

    id: str
    sentence: str
    maths: str
    violation: str  # what is wrong in an implementation that breaks it
    spec: tuple[str, ...]  # statements of docs/spec.md
    needs: tuple[str, ...]  # capabilities; see protocol.capabilities
    problems: Callable[[], Any]  # a hypothesis strategy of Problem
    check: Callable[[Trial, Problem], None]
    simplify: tuple[str, ...] = ("x", "W", "A", "B", "dy", "bias")  # fields whose elements may be
    # replaced by simpler numbers in a counterexample without leaving what the law is about
    cost: int = 1  # of one example, in those of an ordinary law: it is tried with so many fewer

    def share_of(self, examples: int) -> int:
        """How many examples of this law a run of so many is."""
        return max(1, examples // self.cost)
