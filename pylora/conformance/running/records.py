"""The report as files: JUnit's XML, which every CI shows, and JSON, for programs.

Both are written whole or not at all. The JSON's fields are in docs/conformance.md; `VERSION` grows
when one of them changes its meaning or goes, not when one is added.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pylora.conformance.running.report import details, summary
from pylora.conformance.running.runner import BROKEN, FAILED, NOT_TESTED, Outcome, Report
from pylora.errors import ConfigError
from pylora.files.whole import atomic_write

SCHEMA, VERSION = "pylora-conformance-report", 1
# What XML 1.0 cannot hold, not even escaped: most control characters, lone surrogates.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_json(report: Report, *, seed: int, examples: int) -> str:
    """The report as JSON. Numbers that are not finite are null."""
    fields = {
        "schema": SCHEMA,
        "version": VERSION,
        "implementation": report.name,
        "ok": report.ok and not report.warnings,
        "seed": seed,
        "examples": examples,
        "seconds": _number(sum(o.seconds for o in report.outcomes)),
        "warnings": report.warnings,
        "laws": [_law(o) for o in report.outcomes],
    }
    return json.dumps(fields, indent=1, allow_nan=False) + "\n"


def as_junit(report: Report) -> str:
    """The report as JUnit's XML: a test case for each law; FAILED is a failure, BROKEN an error and
    not tested is skipped."""

    def count(status: str) -> int:
        return len(report.of(status))

    total = sum(o.seconds for o in report.outcomes)
    head = (
        f"<testsuite name={_quoted(report.name)} tests={_quoted(len(report.outcomes))} "
        f"failures={_quoted(count(FAILED))} errors={_quoted(count(BROKEN) + len(report.warnings))} "
        f"skipped={_quoted(count(NOT_TESTED))} time={_quoted(f'{total:.3f}')}>"
    )
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>", head]
    for n, warning in enumerate(report.warnings, 1):
        lines.append(f'<testcase classname="pylora.conformance" name="says {n}" time="0.000">')
        lines += [f"<error message={_quoted(warning)}/>", "</testcase>"]
    for o in report.outcomes:
        lines += _case(o)
    lines += [f"<system-out>{_text(summary(report))}</system-out>", "</testsuite>", "</testsuites>"]
    return "\n".join(lines) + "\n"


def check(*files: Path | None) -> None:
    """ConfigError for a file that could not be written: better before the laws than after."""
    for file in files:
        if file is None:
            continue
        if file.is_dir():
            raise ConfigError(f"cannot write the report {file}: a directory of that name is there")
        above = next(p for p in file.absolute().parents if p.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ConfigError(f"cannot write the report {file}: {above} cannot be written to")


def write(file: Path | None, text: str) -> None:
    """Writes one of the reports; nothing where there is no file."""
    if file is not None:
        with atomic_write(file) as beside:
            beside.write_text(text, encoding="utf-8")


def _law(o: Outcome) -> dict[str, Any]:
    return {
        "id": o.law.id,
        "sentence": o.law.sentence,
        "maths": o.law.maths,
        "violation": o.law.violation,
        "spec": list(o.law.spec),
        "status": {FAILED: "failed", BROKEN: "broken"}.get(o.status, o.status),
        "reason": o.reason,
        "examples": o.examples,
        "found_at": o.found_at,
        "raised": o.raised,
        "seconds": _number(o.seconds),
        "largest_error_over_bound": _number(o.tightness) if o.tightness > 0 else None,
        "error_over_bound": _number(o.ratio) if o.status == FAILED else None,
        "notes": {what: {"held": held, "of": of} for what, (held, of) in o.notes.items()},
        "counterexample": o.counterexample or None,
    }


def _case(o: Outcome) -> list[str]:
    name = _quoted(f"{o.law.id} {o.law.sentence}")
    time = _quoted(f"{o.seconds:.3f}")
    out = [f'<testcase classname="pylora.conformance" name={name} time={time}>']
    if o.status in (FAILED, BROKEN):
        tag = "failure" if o.status == FAILED else "error"
        out.append(f"<{tag} message={_quoted(o.reason)}>{_text(details(o))}</{tag}>")
    elif o.status == NOT_TESTED:
        out.append(f"<skipped message={_quoted(o.reason)}/>")
    return [*out, "</testcase>"]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _clean(text: str) -> str:
    """What XML cannot hold, as Python writes it in a string: \\x1b."""
    return _NO_XML.sub(lambda found: repr(found[0])[1:-1], text)


def _text(text: str) -> str:
    return escape(_clean(text))


def _quoted(value: Any) -> str:
    """An attribute's value; line ends are kept, which a reader would else make spaces of."""
    return quoteattr(_clean(str(value)), {"\n": "&#10;", "\r": "&#13;", "\t": "&#9;"})
