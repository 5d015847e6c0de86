"""What `pylora conformance` does: finds the implementation, runs the laws, prints as it goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pylora.conformance.laws import registry
from pylora.conformance.protocol import find
from pylora.conformance.running import records
from pylora.conformance.running.report import details, line, summary
from pylora.conformance.running.runner import BROKEN, FAILED, PROFILES, Outcome, run
from pylora.errors import ConfigError


def listing(ids: Sequence[str]) -> str:
    """The laws with these ids (all if none), as text."""
    parts = []
    for law in registry.find(list(ids)):
        needs = ", ".join(law.needs)
        parts.append(f"{law.id:4} {law.sentence}\n     {law.maths}\n")
        parts.append(f"     violation: {law.violation}\n")
        parts.append(f"     specification {', '.join(law.spec)}; needs {needs}\n")
    return "".join(parts)


def test(
    path: str,
    profile: str,
    laws: Sequence[str],
    examples: int | None,
    seed: int,
    say: Callable[[str], None],
    junit: Path | None = None,
    as_json: Path | None = None,
) -> bool:
    """Whether the implementation that `path` names keeps the laws; says how it goes.

    `junit` and `as_json` are files that the report is written to as well. Raises ConfigError for an
    implementation, a law or a profile that does not exist, and for a file that cannot be written.
    """
    records.check(junit, as_json)
    if profile not in PROFILES:
        raise ConfigError(f"there is no profile {profile!r}; there are {', '.join(PROFILES)}")
    if examples is not None and examples < 1:
        raise ConfigError(f"--examples {examples}: at least 1 is needed")
    sys.path.insert(0, os.getcwd())  # a module in the current folder is found, as python -m does
    made = find(path)
    wrong: list[Outcome] = []

    def each(outcome: Outcome) -> None:
        say(line(outcome))
        if outcome.status in (FAILED, BROKEN):
            wrong.append(outcome)

    number = PROFILES[profile] if examples is None else examples
    report = run(made, laws, examples=number, seed=seed, on_outcome=each)
    records.write(junit, records.as_junit(report))
    records.write(as_json, records.as_json(report, seed=seed, examples=number))
    for outcome in wrong:
        say("\n" + details(outcome))
    for warning in report.warnings:
        say(f"{report.name}: {warning}")
    say("\n" + summary(report))
    return report.ok and not report.warnings
