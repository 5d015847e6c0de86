"""Which laws kill a mutant, and after how many examples.

Examples are hypothesis's, from a fixed seed, without shrinking: a mutant's first wrong result is
all that is asked for. Laws that never touch what a mutant changes are not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pylora.conformance.correct import Correct
from pylora.conformance.law import Law
from pylora.conformance.mutants.registry import Mutant
from pylora.conformance.testcase import Broken, NotTested, Trial, Violation
from pylora.extras import need


@dataclass(frozen=True)
class Kill:
    """A law that found a mutant out at the example of this number (the first is 1)."""

    law: str
    example: int


class _Found(Exception):
    """Ends a search."""


def survives(implementation: Any, law: Law, examples: int) -> int | None:
    """The number of the first example at which the law is broken, or None if it holds in all."""
    hypothesis = need("hypothesis")
    count, first = 0, 0

    def check(problem: Any) -> None:
        nonlocal count, first
        count += 1
        trial = Trial(implementation)
        try:
            law.check(trial, problem)
        except NotTested:
            return
        except (Violation, Broken):
            first = first or count
            raise _Found from None
        finally:
            trial.close()

    settings = hypothesis.settings(
        max_examples=examples,
        phases=(hypothesis.Phase.generate,),
        database=None,
        deadline=None,
        derandomize=True,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings(hypothesis.given(law.problems())(check))()
        except (_Found, hypothesis.errors.Flaky):
            return first
    return first or None


def kills(mutant: Mutant, laws: Sequence[Law], examples: int) -> Iterator[Kill]:
    """The laws that kill it, in their order, each with a fresh mutant."""
    changed = _changed(mutant)
    for law in laws:
        if changed & _touched(law):
            first = survives(mutant.make(), law, examples)
            if first is not None:
                yield Kill(law.id, first)


def _changed(mutant: Mutant) -> frozenset[str]:
    """The attributes of the correct implementation that the mutant has its own of."""
    names: set[str] = set()
    for base in type(mutant.make()).__mro__:
        if base is Correct:
            break
        names |= set(vars(base)) & set(dir(Correct))
    # Every method reads `ops`; mutants of it change the attention alone.
    return frozenset("_attend" if name == "ops" else name for name in names) - {
        "__module__",
        "__doc__",
        "name",
    }


class _Recorder(Correct):
    """Remembers which of its attributes were read."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name != "read":
            self.read.add(name)
        return super().__getattribute__(name)


@cache
def _touched(law: Law) -> frozenset[str]:
    """The attributes of an implementation that the law has a use for, directly or not."""
    recorder = _Recorder()
    survives(recorder, law, 12)
    return frozenset(recorder.read)
