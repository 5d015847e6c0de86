"""Every statement of the specification is cited by a law, or is listed with the reason why not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.laws.registry import LAWS
from pylora.conformance.laws.without import VECTORS, WITHOUT, table
from pylora.conformance.vectors.all import all_cases

DOCS = Path(__file__).parents[3] / "docs"
STATEMENTS = re.findall(r"^- \*\*([A-Z]+-\d+)\*\*", (DOCS / "spec.md").read_text("utf-8"), re.M)


def test_each_statement_has_a_law_or_a_reason():
    assert len(STATEMENTS) == len(set(STATEMENTS)) > 100
    cited = {statement for law in LAWS.values() for statement in law.spec}
    assert cited <= set(STATEMENTS)
    assert set(STATEMENTS) - cited - set(WITHOUT) == set(), (
        "no law cites them, and no reason is given"
    )
    assert cited & set(WITHOUT) == set(), "a law cites them: they need no reason"
    assert set(WITHOUT) <= set(STATEMENTS)


def test_what_the_vectors_hold_is_in_the_vectors():
    held = {statement for case in all_cases() for statement in case.spec}
    assert {id for id, why in WITHOUT.items() if why == VECTORS} <= held


def test_the_list_is_in_the_docs():
    assert table() in (DOCS / "laws.md").read_text("utf-8")
