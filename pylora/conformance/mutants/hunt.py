"""Which laws kill a mutant, and after how many examples.

A law kills a mutant that it finds to fail or to break. Laws that never touch what a mutant changes
are not run: they have the correct implementation before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.every import invoke
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.mutants import mutants
from pylora.conformance.mutants.registry import Mutant
from pylora.conformance.problems.every import KINDS, OPTIONS, arguments
from pylora.conformance.running.runner import BROKEN, FAILED, PROFILES, Outcome, Search, run_law
from pylora.conformance.testcase import Problem


def kills(
    mutant: Mutant,
    laws: Iterable[Law] | None = None,
    *,
    examples: int = PROFILES["quick"],
    seed: int = 0,
) -> Iterator[Outcome]:
    """The outcomes of the laws that kill it, in the order of the laws, each with a fresh mutant."""
    changed = _changed(mutant)
    for law in concerned(mutant, laws):
        only = _narrowed(law, changed)
        outcome = run_law(mutant.make(), only, examples=examples, seed=seed, shrink=False)
        if outcome.status in (FAILED, BROKEN):
            yield outcome


def killer(mutant: Mutant, *, seed: int = 0) -> Outcome | None:
    """A law of the quick profile that kills it, found in little time: few examples come first, and
    laws that walk through a list of problems last among them."""
    for examples in (10, PROFILES["quick"]):
        few = examples < PROFILES["quick"]  # then what walks a list is asked first: it finds limits
        laws = sorted(LAWS.values(), key=lambda law: (law.covering is not None) == few)
        found = next(kills(mutant, laws, examples=examples, seed=seed), None)
        if found is not None:
            return found
    return None


def hunt(say: Callable[[str], None], *, seed: int = 0) -> bool:
    """Kills all mutants, says how, one line each, and returns whether none survived."""
    every, alive = mutants(), 0
    for mutant in every:
        found = killer(mutant, seed=seed)
        alive += found is None
        how = f"{found.law.id:4} at example {found.found_at}" if found else "SURVIVES"
        say(f"{mutant.id:34} {how}")
    say(f"{len(every)} mutants, {len(every) - alive} killed, {alive} alive")
    return alive == 0


def concerned(mutant: Mutant, laws: Iterable[Law] | None = None) -> list[Law]:
    """Of these laws (all if none is given) those that use something that the mutant changes."""
    changed = _changed(mutant)
    laws = LAWS.values() if laws is None else laws
    return [law for law in laws if changed & _used(law)]


def _changed(mutant: Mutant) -> frozenset[str]:
    """The attributes of the correct implementation that the mutant has its own of."""
    names: set[str] = set()
    for base in type(mutant.make()).__mro__:
        if base is Correct:
            break
        names |= set(vars(base)) & set(dir(Correct))
    if "ops" in names:  # every method reads it, and a mutant of it changes the attention or dropout
        names = names - {"ops"} | {"_attend", "drop"}
    return frozenset(n for n in names if not n.startswith("__") and n != "name")


class _Recorder(Correct):
    """Remembers which of its attributes were read."""

    def __init__(self) -> None:
        self.read: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("__") and name != "read":
            self.read.add(name)
        return super().__getattribute__(name)


@cache
def _used(law: Law) -> frozenset[str]:
    """The attributes of an implementation that the law has a use for, directly or not."""
    recorder = _Recorder()
    search = Search(recorder, replace(law, covering=None))
    recorder.read.clear()  # which methods there are was looked up
    search.run(law.share_of(12), 0, False)
    # A law of any method calls some of them only, in so few examples.
    if not _of_any_method(law):
        return frozenset(recorder.read)
    return frozenset(recorder.read).union(*(_read_by(method) for method in KINDS))


def _of_any_method(law: Law) -> bool:
    return law.check.__module__.rpartition(".")[2] in ("every", "every_calls")


def _narrowed(law: Law, changed: frozenset[str]) -> Law:
    """A law of any method without what its list holds of methods that are the correct ones."""
    if not _of_any_method(law):
        return law
    mine = {method for method in KINDS if changed & _read_by(method)}

    def covering(dtype: str, examples: int) -> Iterator[Problem]:
        for p in law.covering(dtype, examples) if law.covering else ():
            if mine & set(vars(p).get("methods", ()) or (p.method,)):
                yield p

    return replace(law, covering=covering)


@cache
def _read_by(method: str) -> frozenset[str]:
    """The attributes of an implementation that a call of the method has a use for."""
    recorder = _Recorder()
    for seed in range(OPTIONS.get(method, 1)):
        invoke(recorder, method, arguments(method, "float32", seed))
    return frozenset(recorder.read | {method})
