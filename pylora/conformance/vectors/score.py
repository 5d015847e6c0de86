"""How a port did: every output and answer passed, failed or not attempted, summed by statement.

A case is attempted if any of its outputs is there; then a missing one is a failure. A statement of
the specification is failed if anything that shows it failed, passed if all that shows it passed,
and `part` if what was attempted passed and the rest was not attempted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.conformance.vectors import outputs as port
from pylora.conformance.vectors.cases import Case, Expected
from pylora.conformance.vectors.questions import Question, differences
from pylora.types import Array

PASSED, PART, FAILED, ABSENT = "passed", "part", "failed", "not attempted"
_COLORS = {PASSED: "brightgreen", PART: "yellowgreen", FAILED: "red", ABSENT: "lightgrey"}
LABEL = "pylora vectors"


@dataclass(frozen=True)
class Item:
    """One output or answer: which statements it shows, and how it came out."""

    name: str  # "lora-plain/y", "plans/regex-part"
    spec: tuple[str, ...]
    state: str  # passed, failed or not attempted
    why: str = ""


@dataclass(frozen=True)
class Score:
    """All items, and what in the folder belongs to none of them."""

    items: tuple[Item, ...]
    foreign: tuple[str, ...] = ()

    def of(self, state: str) -> list[Item]:
        """The items in a state."""
        return [item for item in self.items if item.state == state]

    def statements(self) -> dict[str, dict[str, int]]:
        """Statement -> how many of its items passed, failed, were not attempted; in order."""
        found: dict[str, dict[str, int]] = {}
        for item in self.items:
            for statement in item.spec:
                counts = found.setdefault(statement, dict.fromkeys((PASSED, FAILED, ABSENT), 0))
                counts[item.state] += 1
        return dict(sorted(found.items(), key=lambda pair: _order(pair[0])))

    def states(self) -> dict[str, str]:
        """Statement -> passed, part, failed or not attempted."""
        return {name: _state(counts) for name, counts in self.statements().items()}

    @property
    def state(self) -> str:
        """Of the whole."""
        return _state({s: len(self.of(s)) for s in (PASSED, FAILED, ABSENT)})

    def message(self) -> str:
        """The badge's text: "all 70 statements passed", "2 of 84 statements failed"."""
        states = list(self.states().values())
        n, failed = len(states), states.count(FAILED)
        if failed:
            return f"{failed} of {n} statements failed"
        whole, part = states.count(PASSED), states.count(PART)
        if whole == n:
            return f"all {n} statements passed"
        return f"{whole} of {n} statements passed" + (f", {part} in part" if part else "")

    def badge(self) -> dict[str, Any]:
        """What a shields.io endpoint reads."""
        color = _COLORS[self.state]
        return {"schemaVersion": 1, "label": LABEL, "message": self.message(), "color": color}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON report."""
        counts = {s: len(self.of(s)) for s in (PASSED, FAILED, ABSENT)}
        states = self.states()
        return {
            "state": self.state,
            "message": self.message(),
            "items": counts,
            "statements": {
                name: {"state": states[name]} | numbers
                for name, numbers in self.statements().items()
            },
            "failures": {item.name: item.why for item in self.of(FAILED)},
            "not_attempted": [item.name for item in self.of(ABSENT)],
            "foreign": list(self.foreign),
        }

    def markdown(self) -> str:
        """A table of the statements."""
        states = self.states()
        rows = ["| statement | state | passed | failed | not attempted |", "|---|---|---|---|---|"]
        for name, c in self.statements().items():
            rows.append(f"| {name} | {states[name]} | {c[PASSED]} | {c[FAILED]} | {c[ABSENT]} |")
        return "\n".join([f"**{LABEL}**: {self.message()}", "", *rows]) + "\n"


def score(
    where: Any,
    cases: list[Case],
    questions: Mapping[str, tuple[Any, list[Question]]],
) -> Score:
    """Compares what a port wrote with what is expected. FileFormatError where `where` is no folder
    and no file of outputs; whatever is wrong inside is an item that failed, or foreign."""
    found = port.find(where, cases)
    items = [item for case in cases for item in _case(case, found)]
    names = set()
    for kind, (_, some) in questions.items():
        for q in some:
            names.add((kind, q.name))
            items.append(_question(kind, q, found))
    foreign = [*found.foreign, *("/".join(key)[:120] for key in found.answers if key not in names)]
    return Score(tuple(items), tuple(foreign))


def _case(case: Case, found: port.Outputs) -> list[Item]:
    attempted = any((case.name, name) in found.arrays for name in case.outputs)
    items = []
    for name, want in case.outputs.items():
        title, spec, key = f"{case.name}/{name}", case.shown_by(name), (case.name, name)
        if not attempted:
            items.append(Item(title, spec, ABSENT))
        elif key not in found.arrays:
            items.append(Item(title, spec, FAILED, "is missing, though the case was attempted"))
        else:
            why = _compare(want, found.arrays[key])
            items.append(Item(title, spec, FAILED if why else PASSED, why))
    return items


def _compare(want: Expected, source: Any) -> str:
    """What is wrong with an output, in words; "" if nothing is."""
    try:
        got = port.read(source, want.value, want.bound is not None)
    except ValueError as error:
        return str(error)
    value = want.value.reshape(-1)
    if want.bound is None:
        bad = _bits(got) != _bits(value)
        allowed = "the same bits"
    else:
        bound = want.bound.reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            bad = ~(np.abs(got - value) <= bound)
        allowed = ""
    wrong = np.flatnonzero(bad)
    if not wrong.size:
        return ""
    i = int(wrong[0])
    if want.bound is not None:
        allowed = f"within {want.bound.reshape(-1)[i]:.3g}"
    at = [int(n) for n in np.unravel_index(i, want.value.shape)]
    return (
        f"{wrong.size} of {value.size} numbers are wrong, the first at {at}: {got[i]!r}, expected "
        f"{value[i]!r}, {allowed}"
    )


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _question(kind: str, q: Question, found: port.Outputs) -> Item:
    name = f"{kind}/{q.name}"
    if (kind, q.name) not in found.answers:
        return Item(name, q.spec, ABSENT)
    wrong = differences(kind, q.expect, found.answers[kind, q.name])
    return Item(name, q.spec, FAILED if wrong else PASSED, "; ".join(wrong[:3]))


def _state(counts: Mapping[str, int]) -> str:
    if counts[FAILED]:
        return FAILED
    if not counts[PASSED]:
        return ABSENT
    return PART if counts[ABSENT] else PASSED


def _order(statement: str) -> tuple[str, int]:
    letter, number = re.fullmatch(r"([A-Z]+)-(\d+)", statement).groups()  # type: ignore[union-attr]
    return letter, int(number)
