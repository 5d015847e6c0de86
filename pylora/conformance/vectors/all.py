"""All golden vectors; cases.py writes and reads them."""

from __future__ import annotations

from pylora.conformance.vectors import model, ops
from pylora.conformance.vectors.cases import Case


def all_cases() -> list[Case]:
    """Every case, computed now (seconds)."""
    return [*ops.cases(), *model.cases()]
