"""Every statement of the specification is cited by a law."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.laws.registry import LAWS

DOCS = Path(__file__).parents[3] / "docs"
STATEMENTS = re.findall(r"^- \*\*([A-Z]+-\d+)\*\*", (DOCS / "spec.md").read_text("utf-8"), re.M)


def test_each_statement_has_a_law():
    assert len(STATEMENTS) == len(set(STATEMENTS)) > 100
    cited = {statement for law in LAWS.values() for statement in law.spec}
    assert cited <= set(STATEMENTS)
    assert set(STATEMENTS) - cited == set(), "no law cites them"
