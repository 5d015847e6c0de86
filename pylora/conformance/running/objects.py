"""What a counterexample's writer asks of values: which is which, and what each was before."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.testcase import Problem
from pylora.types import Array


def same(a: Array, b: Array) -> bool:
    """Bit for bit."""
    bits = [np.ascontiguousarray(v).tobytes() for v in (a, b)]
    return a.shape == b.shape and bits[0] == bits[1]


def apart(text: str) -> str:
    """In brackets, unless it is one thing already."""
    node = ast.parse(text, mode="eval").body
    whole = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Constant, ast.List, ast.Tuple)
    return text if isinstance(node, whole) else f"({text})"


def pairs(value: Any, before: Any) -> Iterator[tuple[Array, Array]]:
    """Each array with its copy."""
    if isinstance(value, np.ndarray):
        yield value, before
    elif isinstance(value, (list, tuple)):
        for v, b in zip(value, before):
            yield from pairs(v, b)


def began(value: Any, first: dict[int, Array]) -> Any:
    """`value` with each array as it was before the first call that was given it."""
    if isinstance(value, np.ndarray):
        return first.get(id(value), value)
    if isinstance(value, (list, tuple)):
        return type(value)(began(v, first) for v in value)
    if isinstance(value, dict):
        return {k: began(v, first) for k, v in value.items()}
    if isinstance(value, Problem):
        return Problem(**began(vars(value), first))
    return value


def within(container: Any, value: Any, name: str) -> str | None:
    """The expression for the very object `value` in a result called `name`; None elsewhere."""
    if container is value:
        return name
    items: list[tuple[Any, Any]] = []
    if isinstance(container, (list, tuple)):
        items = list(enumerate(container))
    elif isinstance(container, dict):
        items = list(container.items())
    for key, item in items:
        found = within(item, value, f"{name}[{key!r}]")
        if found:
            return found
    return None
