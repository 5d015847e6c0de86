"""All golden vectors; cases.py and questions.py write them, score.py holds a port against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.conformance.vectors import (
    adapterfiles,
    converters,
    features,
    layers,
    merging,
    model,
    ops,
    parts,
    plans,
    steps,
    streams,
    weighted,
)
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.questions import Question


def all_cases() -> list[Case]:
    """Every case, computed now (seconds)."""
    files = (ops, layers, weighted, merging, streams, parts, features, steps, model)
    return [case for file in files for case in file.cases()]


def all_questions() -> dict[str, tuple[Mapping[str, Any], list[Question]]]:
    """Every question by kind, with the models that they name."""
    return {
        "plans": (plans.models(), plans.questions()),
        "files": (adapterfiles.models(), adapterfiles.questions()),
        "converters": ({}, converters.questions()),
    }
