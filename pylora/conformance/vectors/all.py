"""All golden vectors; cases.py writes and reads them."""

from __future__ import annotations

from pylora.conformance.vectors import layers, merging, model, ops, parts, steps, streams
from pylora.conformance.vectors.cases import Case


def all_cases() -> list[Case]:
    """Every case, computed now (seconds)."""
    files = (ops, layers, merging, streams, parts, steps, model)
    return [case for file in files for case in file.cases()]
