"""What the laws say of a mutant: killed, equivalent, within the bounds, or alive.

A law that finds it to fail or to break kills it. The laws that can meet the change are run, the
quick ones first, with few examples and then with those of the quick profile; one that lives after
the first round is compared with what it was made from (corpus.py), and sorted out if it is the
same. A mutant that hangs is killed by the processor time that it takes.
"""

from __future__ import annotations

import json
import os
import signal
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from pylora.conformance.correct.attending import CorrectDecoder
from pylora.conformance.correct.plain import Correct, CorrectModule
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.perturb.corpus import differs
from pylora.conformance.perturb.python import Mutant
from pylora.conformance.protocol import METHODS
from pylora.conformance.running.runner import BROKEN, FAILED, run_law
from pylora.ops.formulas import Formulas
from pylora.reference import Reference

KILLED, EQUIVALENT, WITHIN, ALIVE = "killed", "equivalent", "within the bounds", "alive"
FEW, QUICK = 10, 100
PATIENCE = 30  # seconds of processor time for one law


@dataclass(frozen=True)
class Verdict:
    """What came of one mutant."""

    id: str
    kind: str
    text: str
    status: str
    law: str = ""
    at: int = 0  # the number of the example
    seconds: float = 0.0  # of processor time


@dataclass(frozen=True)
class Reach:
    """What a law runs through: methods of the protocol, and functions of the implementation."""

    law: Law
    methods: frozenset[str]
    functions: frozenset[str]
    seconds: float


_NESTED = {
    "back": "attention_backward",
    "project": "_attend",
    "attention": "layer",
    "forward": "layer",
}  # functions inside of others


@contextmanager
def _watched(seen: set[str]) -> Iterator[None]:
    """While it lasts, each function of the correct implementation that is called is put down."""
    kept: list[tuple[type, str, Any]] = []
    classes = [c for c in Correct.__mro__ if c is not object]
    for cls in (*classes, CorrectModule, CorrectDecoder, Reference, Formulas):
        for name, function in list(vars(cls).items()):
            if isinstance(function, types.FunctionType) and not name.startswith("__"):
                kept.append((cls, name, function))

                def watched(
                    *args: Any, name: str = name, function: Any = function, **more: Any
                ) -> Any:
                    seen.add(name)
                    return function(*args, **more)

                setattr(cls, name, watched)
    try:
        yield
    finally:
        for cls, name, function in kept:
            setattr(cls, name, function)


def reaches() -> list[Reach]:
    """Of every law, by running it on the correct implementation; the quick ones first."""
    found = []
    for law in LAWS.values():
        seen: set[str] = set()
        began = time.process_time()
        with _watched(seen):
            run_law(Correct(), law, examples=4, shrink=False)
        seen |= {inner for inner, outer in _NESTED.items() if outer in seen}
        methods = frozenset(seen & set(METHODS))
        found.append(Reach(law, methods, frozenset(seen), time.process_time() - began))
    return sorted(found, key=lambda reach: reach.seconds)


def concerned(mutant: Mutant, every: list[Reach]) -> list[Law]:
    """The laws that can meet its change; those of sizes first where sizes are what it is about."""
    if mutant.kind.startswith("source"):
        where = mutant.text.split(" ")[1].rstrip(":")
        return [r.law for r in every if where in r.functions]
    laws = [r.law for r in every if mutant.methods & (r.methods | set(r.law.needs))]
    if mutant.kind == "size":
        needs = set(mutant.methods)
        laws.sort(
            key=lambda law: (getattr(law, "covering", None) is None, not needs & set(law.needs))
        )
    return laws


class Hangs(BaseException):
    """The mutant takes more processor time than any law does. No Exception: those of a mutant are
    taken for its answer, and the law goes on."""


@contextmanager
def patience(seconds: float, deadly: bool = False) -> Iterator[None]:
    """Hangs is raised in what runs longer; or, since a loop in C does not hear of it, the process
    ends."""

    def stop(number: int, frame: Any) -> None:
        raise Hangs(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGPROF, signal.SIG_DFL if deadly else stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(mutant: Mutant, every: list[Reach], seed: int = 0, deadly: bool = False) -> Verdict:
    """Runs the laws that concern it. `deadly`: this process may end with it."""
    began = time.process_time()

    def verdict(status: str, law: str = "", at: int | None = None) -> Verdict:
        spent = round(time.process_time() - began, 2)
        return Verdict(mutant.id, mutant.kind, mutant.text, status, law, at or 0, spent)

    try:
        made = mutant.make()
    except Exception as error:
        return verdict(KILLED, f"cannot be made: {type(error).__name__}")
    laws = concerned(mutant, every)
    for examples in (FEW, QUICK):
        if examples == FEW and mutant.kind == "size":
            continue  # sizes are walked to the end with the quick profile's examples
        for law in laws:
            try:
                with patience(PATIENCE, deadly):
                    outcome = run_law(made, law, examples=examples, seed=seed, shrink=False)
            except Hangs:
                return verdict(KILLED, f"{law.id} hangs")
            except Exception as error:  # a law that stumbles over a result has found it wrong
                return verdict(KILLED, f"{law.id} raised {type(error).__name__}")
            if outcome.status in (FAILED, BROKEN):
                return verdict(KILLED, law.id, outcome.found_at)
        if examples == FEW:
            methods = mutant.methods or _methods(mutant, every)
            same = differs(mutant.make(), methods, mutant.original())
            if same == "same":
                return verdict(EQUIVALENT)
            if same == "within":
                return verdict(WITHIN)
    return verdict(ALIVE)


def judge_apart(mutant: Mutant, every: list[Reach], seed: int = 0) -> Verdict:
    """As `judge`, in a process of its own: one that falls dead is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(asdict(judge(mutant, every, seed, deadly=True)), out)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as got:
        text = got.read()
    os.waitpid(child, 0)
    if text:
        return Verdict(**json.loads(text))
    return Verdict(mutant.id, mutant.kind, mutant.text, KILLED, "falls dead")


def _methods(mutant: Mutant, every: list[Reach]) -> frozenset[str]:
    """The protocol's methods in whose laws its function is run."""
    where = mutant.text.split(" ")[1].rstrip(":")
    reached = [r for r in every if where in r.functions]
    methods = frozenset().union(*(r.methods for r in reached)) if reached else frozenset()
    return frozenset({"module"}) if where in ("attach", "detach", "weight") else methods
