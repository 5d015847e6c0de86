"""Runs laws on an implementation: hypothesis finds and shrinks, the outcome says what happened.

Runs are repeatable: the examples are a function of the law, the seed and the number of examples
(repeatable.py); nothing is stored. An implementation that raises, or returns what the protocol does
not allow, is reported as broken there, with its smallest such example, and the search goes on.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylora.conformance.laws.law import Law
from pylora.conformance.laws.registry import find
from pylora.conformance.protocol import capabilities, instantiate, name_of, problems_of
from pylora.conformance.running.counterexample import program, searched
from pylora.conformance.running.repeatable import nothing_gathered
from pylora.conformance.running.shrink import simpler, smallest
from pylora.conformance.running.storage import elsewhere
from pylora.conformance.testcase import Broken, NotTested, Problem, Trial, Violation
from pylora.extras import need

PASSED, FAILED, BROKEN, NOT_TESTED = "passed", "FAILED", "BROKEN", "not tested"
PROFILES = {"quick": 100, "thorough": 1000, "nightly": 10_000}  # examples of each law


@dataclass
class Outcome:
    """What came of one law."""

    law: Law
    status: str
    reason: str = ""  # of failed, broken and not tested: a sentence
    examples: int = 0
    found_at: int | None = None  # the number of the first example that failed or broke
    raised: int = 0  # examples in which the implementation broke
    tightness: float = (
        0.0  # the largest error / bound of what passed; 0 where laws ask for equality
    )
    ratio: float = 0.0  # error / bound of the counterexample
    counterexample: str = ""  # a program
    notes: dict[str, tuple[int, int]] = field(default_factory=dict)  # what: (held, of)
    seconds: float = 0.0


@dataclass
class Report:
    """Of one implementation, law by law."""

    name: str
    warnings: list[str]
    outcomes: list[Outcome]

    @property
    def ok(self) -> bool:
        """Whether no law failed or broke. What was not tested does not count, either way."""
        return not any(o.status in (FAILED, BROKEN) for o in self.outcomes)

    def of(self, status: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == status]


def run(
    implementation: Any,
    laws: Iterable[str] = (),
    *,
    examples: int = PROFILES["quick"],
    seed: int = 0,
    on_outcome: Callable[[Outcome], None] | None = None,
    shrink: bool = True,
) -> Report:
    """Runs the laws with these ids (all if none is given) on an implementation or its class.

    `on_outcome` is called after each law. Raises ConfigError for an unknown id.
    """
    made, chosen = instantiate(implementation), find(tuple(laws))
    report = Report(name_of(made), problems_of(made), [])
    for law in chosen:
        outcome = run_law(made, law, examples=examples, seed=seed, shrink=shrink)
        report.outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
    return report


def attempt(implementation: Any, law: Law, problem: Problem) -> Trial:
    """One example. Raises Violation, Broken or NotTested, each with the trial as `.trial`."""
    trial = Trial(implementation)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            law.check(trial, problem)
    except (Violation, Broken, NotTested) as error:
        error.trial = trial  # type: ignore[union-attr]
        raise
    finally:
        trial.close()
    return trial


def run_law(
    implementation: Any, law: Law, *, examples: int = 100, seed: int = 0, shrink: bool = True
) -> Outcome:
    """The outcome of one law."""
    can = capabilities(implementation)
    missing = [name for name in law.needs if name not in can]
    if law.dtypes and not can & set(law.dtypes):
        missing.append(" or ".join(law.dtypes))
    if missing:
        return Outcome(law, NOT_TESTED, f"there is no {', '.join(missing)}")
    began = time.perf_counter()
    search = Search(implementation, law)
    with rarely_collected():
        search.run(law.share_of(examples), seed, shrink)
        outcome = search.outcome(shrink)
    outcome.seconds = time.perf_counter() - began
    return outcome


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Garbage in cycles is looked for a hundred times less often while it lasts: hypothesis makes
    many small objects, and looking through them all is a seventh of a run's time."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Search:
    """What hypothesis's examples of one law come to."""

    def __init__(self, implementation: Any, law: Law) -> None:
        self.implementation, self.law = implementation, law
        can = capabilities(implementation)
        self.dtypes = [dtype for dtype in law.dtypes if dtype in can]
        self.count = self.raised = 0
        self.asked = 0, 0  # examples, seed
        self.found_at: int | None = None
        self.broken_at: int | None = None
        self.failure: tuple[Problem, Violation] | None = None
        self.broken: tuple[int, Problem, Broken] | None = None
        self.not_tested: dict[str, int] = {}
        self.tightness = 0.0
        self.notes: dict[str, list[int]] = {}

    def run(self, examples: int, seed: int, shrink: bool) -> None:
        self.asked = examples, seed
        hypothesis = need("hypothesis")
        phases = [hypothesis.Phase.generate] + [hypothesis.Phase.shrink] * shrink
        settings = hypothesis.settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=phases,
            report_multiple_bugs=False,
            print_blob=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
        )

        def check(problem: Problem) -> None:
            self.example(problem)

        if not self.covered(examples, shrink):
            return
        wrapped = hypothesis.given(problem=self.problems())(check)
        try:
            with elsewhere(), nothing_gathered():
                hypothesis.seed(seed)(settings(wrapped))()
        except Violation:
            pass  # it is kept in self.failure
        except hypothesis.errors.Flaky:
            pass  # a failure that came and went is a failure: the implementation depends on chance

    def problems(self) -> Any:
        """The law's strategy: of each dtype in turn where it has several."""
        if not self.law.dtypes:
            return self.law.problems()
        one_of = need("hypothesis.strategies").one_of
        return one_of([self.law.problems(dtype) for dtype in self.dtypes])

    def covered(self, examples: int, shrink: bool) -> bool:
        """Whether the law holds for all problems of its covering list."""
        if self.law.covering is None:
            return True
        for dtype in self.dtypes or ["float32"]:
            for problem in self.law.covering(dtype, examples):
                try:
                    self.example(problem)
                except Violation:
                    if shrink:
                        self.failure = smallest(*self.failure, self._violation)  # type: ignore
                    return False
        return True

    def example(self, problem: Problem) -> None:
        searching = self.found_at is None
        self.count += searching
        try:
            trial = attempt(self.implementation, self.law, problem)
        except Violation as violation:
            if searching:
                self.found_at = self.count
            self.failure = problem, violation
            raise
        except Broken as broken:
            if searching:
                self.raised += 1
                self.broken_at = self.broken_at or self.count
            size = _size(problem)
            if self.broken is None or size < self.broken[0]:
                self.broken = size, problem, broken
        except NotTested as reason:
            self.not_tested[str(reason)] = self.not_tested.get(str(reason), 0) + searching
        else:
            if searching:
                self.tightness = max(self.tightness, trial.ratio)
                for note, held in trial.notes.items():
                    counts = self.notes.setdefault(note, [0, 0])
                    counts[0] += held
                    counts[1] += 1

    def outcome(self, shrink: bool) -> Outcome:
        law = self.law
        out = Outcome(
            law,
            PASSED,
            examples=self.count,
            found_at=self.found_at or self.broken_at,
            raised=self.raised,
            tightness=self.tightness,
            notes={k: (v[0], v[1]) for k, v in self.notes.items()},
        )
        if self.failure is not None:
            problem, violation = self.failure
            if shrink:
                problem, violation = simpler(
                    problem, violation, law.simplify, lambda p: self._violation(p)
                )
            out.status, out.reason, out.ratio = FAILED, str(violation), violation.ratio
            out.counterexample = self._program(problem, violation, shrink)
        elif self.broken is not None:
            _, problem, broken = self.broken
            out.status = BROKEN
            out.reason = f"{broken} (in {self.raised} of {self.count} examples)"
            out.counterexample = self._program(problem, broken, shrink)
        elif sum(self.not_tested.values()) >= self.count:
            out.status, out.reason = NOT_TESTED, next(iter(self.not_tested), "no example was drawn")
        elif self.not_tested:
            out.notes["not tested"] = sum(self.not_tested.values()), self.count
        return out

    def _violation(self, problem: Problem) -> Violation | None:
        """The violation of another problem, if it is one."""
        try:
            attempt(self.implementation, self.law, problem)
        except Violation as violation:
            return violation
        except (Broken, NotTested):
            return None
        return None

    def _program(self, problem: Problem, error: Any, shrunk: bool) -> str:
        law, trial = self.law, error.trial
        said = f"{law.id}: {law.sentence}\n{law.maths}\n{error}"
        if not shrunk and _size(problem) > SHOWN:  # too long to read; the search is found again
            return searched(self.implementation, law, trial, said, self.asked)
        if isinstance(error, Broken):
            error = Violation(str(error), source=error.source, holds=error.holds)
        return program(self.implementation, law, problem, trial, error, said, self.asked)


SHOWN = 5000  # numbers of a problem that was not made small and is written out all the same


def _size(problem: Any) -> int:
    """How many numbers it has, in arrays in lists and dicts too."""
    if isinstance(problem, np.ndarray):
        return int(problem.size)
    inner: Any = ()
    if isinstance(problem, Problem):
        inner = vars(problem).values()
    elif isinstance(problem, dict):
        inner = problem.values()
    elif isinstance(problem, (list, tuple)):
        inner = problem
    return 1 + sum(_size(v) for v in inner)
