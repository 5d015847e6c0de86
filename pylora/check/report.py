"""What `pylora check` found, as data: a verdict and its numbers for each thing checked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from pylora.types import brief

PASS, FAIL, WARN, SKIP = "pass", "FAIL", "warning", "not tested"


@dataclass(frozen=True)
class Finding:
    """One verdict; only "FAIL" fails the report."""

    check: str
    verdict: str  # "pass", "FAIL", "warning" or "not tested"
    measured: float | None
    allowed: float | None
    text: str

    @classmethod
    def of(cls, check: str, measured: float, allowed: float, text: str) -> Finding:
        """Passes if measured <= allowed, which NaN is not."""
        verdict = PASS if measured <= allowed < math.inf else FAIL
        return cls(check, verdict, float(measured), float(allowed), text)


@dataclass
class Report:
    """What was checked, on what, and what came of it."""

    __repr__ = brief

    model: str
    adapter: str
    backend: str
    tokens: int
    seed: int
    scope: str  # what the float64 checks ran on, in words
    findings: list[Finding] = field(default_factory=list)
    modules: list[dict[str, Any]] = field(default_factory=list)  # numbers of each adapted module

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return all(f.verdict != FAIL for f in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a number that is not finite becomes its name."""
        values: dict[str, Any] = _plain({"ok": self.ok, **dataclasses.asdict(self)})
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
