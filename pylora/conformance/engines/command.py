"""What `pylora conformance --suite` does: runs an engine or a converter through a suite, and says
how it goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylora.conformance.engines import report
from pylora.conformance.engines.book import Book
from pylora.conformance.engines.convert import Conversion
from pylora.conformance.engines.loading import loading
from pylora.conformance.engines.process import Server
from pylora.conformance.engines.run import SEQUENCES, Finding, Run, failed
from pylora.conformance.suite.tolerance import Sensitivity
from pylora.errors import ConfigError


def _known(book: Book, settings: Settings) -> None:
    """ConfigError for a test that the suite does not have, before anything is started."""
    known = {"base", *SEQUENCES}
    for base in book.bases(list(settings.bases)):
        known |= {c["name"] for c in base["cases"]}
        known |= {f"refuse {r['name']}" for r in base["refuse"]}
    for name in settings.tests:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"--test {name!r}: the suite has no such test{hint}")


@dataclass(frozen=True)
class Settings:
    """What was asked for: of `engine`, `restart` and `convert` the one or two that make sense."""

    suite: Path
    engine: str | None = None
    restart: str | None = None
    convert: str | None = None
    adapters_by: str = "vllm"
    precision: str = "fp32"
    form: str | None = None
    api_key: str | None = None
    timeout: float = 60.0
    start: float = 120.0
    bases: Sequence[str] = ()
    tests: Sequence[str] = ()
    json: Path | None = None
    junit: Path | None = None


def test(settings: Settings, say: Callable[[str], None]) -> bool:
    """Whether nothing was wrong. ConfigError for settings that cannot be, EngineError for an engine
    that cannot be reached or gives no log-probabilities."""
    Sensitivity(0, 0).tolerance(settings.precision)  # an unknown precision is refused first
    book = Book(settings.suite)
    findings: list[Finding] = []

    def each(finding: Finding) -> None:
        findings.append(finding)
        say(report.line(finding))

    _known(book, settings)
    if settings.convert is not None:
        what = settings.convert
        form, limit = settings.form or "peft", settings.timeout
        Conversion(book, what, form, limit, each, settings.tests).all(settings.bases)
    else:
        what = settings.engine or settings.restart or ""
        key, patience = settings.api_key, settings.start
        with Server(settings.engine, settings.restart, key, settings.timeout, patience) as server:
            load = loading(settings.adapters_by, server, settings.form)
            Run(book, load, settings.precision, each, settings.tests).all(settings.bases)
    about: dict[str, Any] = {
        "what": what,
        "adapters_by": None if settings.convert else settings.adapters_by,
        "precision": settings.precision,
        "suite_seed": book.manifest["seed"],
    }
    if settings.json is not None:
        report.write_json(settings.json, findings, about)
    if settings.junit is not None:
        report.write_junit(settings.junit, findings, what)
    if not findings:
        raise ConfigError("no test was run")
    bad = list(failed(findings))
    if bad:
        say("")
    for finding in bad:
        say(f"{finding.base}, {finding.test} ({finding.rule}): {finding.verdict.text}")
    say("\n" + report.summary(findings))
    return not bad
