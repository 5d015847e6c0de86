"""The findings as lines, as JSON and as JUnit's XML."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from pylora.conformance.engines import verdict as v
from pylora.conformance.engines.run import Finding
from pylora.files.whole import atomic_write


def line(f: Finding) -> str:
    """One finding in one line."""
    said = f.verdict.text
    if f.verdict.error is not None and f.verdict.kind == v.RIGHT:
        said = " ".join(
            [said, f"[{f.verdict.error:.1e} of {f.verdict.tolerance:.1e} {f.verdict.unit}]"]
        ).strip()
    return f"{f.base:14} {f.test:22} {f.verdict.kind:15} {said}".rstrip()


def summary(findings: Sequence[Finding]) -> str:
    """How many of each verdict."""
    counts = Counter(f.verdict.kind for f in findings)
    order = (v.RIGHT, v.WRONG, v.FAILED, v.REFUSED, v.CANNOT_TELL, v.CANNOT_SAY, v.NOT_TESTED)
    listed = ", ".join(f"{counts[kind]} {kind}" for kind in order if counts[kind])
    return f"{len(findings)} tests: {listed}"


def write_json(path: Path, findings: Sequence[Finding], about: dict[str, Any]) -> None:
    """{"about": {...}, "findings": [...]}; numbers that are infinite are null."""
    listed = [
        {
            "base": f.base,
            "test": f.test,
            "rule": f.rule,
            "verdict": f.verdict.kind,
            "wrong_rule": f.verdict.rule or None,
            "text": f.verdict.text,
            "error": _finite(f.verdict.error),
            "tolerance": f.verdict.tolerance,
            "seconds": round(f.seconds, 3),
        }
        for f in findings
    ]
    text = json.dumps({"about": about, "findings": listed}, indent=1, ensure_ascii=False)
    with atomic_write(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def write_junit(path: Path, findings: Sequence[Finding], name: str) -> None:
    """A test suite of one test a finding; what was not tested or cannot be said is skipped."""
    bad = sum(f.verdict.kind in v.BAD for f in findings)
    passed = sum(f.verdict.kind in (v.RIGHT, v.REFUSED) for f in findings)
    head = (
        f"<testsuite name={_attribute(name)} tests='{len(findings)}' failures='{bad}' "
        f"skipped='{len(findings) - bad - passed}' time='{sum(f.seconds for f in findings):.3f}'>"
    )
    rows = []
    for f in findings:
        where = f"classname={_attribute(f.base)} name={_attribute(f.test)} time='{f.seconds:.3f}'"
        said = _attribute(f"{f.verdict.kind}: {f.verdict.text}")
        inside = ""
        if f.verdict.kind in v.BAD:
            inside = f"<failure message={said}>{escape(_printable(f.rule))}</failure>"
        elif f.verdict.kind not in (v.RIGHT, v.REFUSED):
            inside = f"<skipped message={said}/>"
        rows.append(f"<testcase {where}>{inside}</testcase>")
    text = "\n".join(["<?xml version='1.0' encoding='utf-8'?>", head, *rows, "</testsuite>", ""])
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _printable(text: str) -> str:
    """Without the characters that XML forbids: an engine's message may hold any."""
    return "".join(c if c.isprintable() else " " for c in text)


def _attribute(text: str) -> str:
    return quoteattr(_printable(text))
