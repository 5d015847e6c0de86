"""Modules that are alike in all but their layer, put together for display.

A path's numbers become a pattern: `model.layers.3.mlp.up_proj` is one of
`model.layers.*.mlp.up_proj`. Nothing is computed from what is folded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Folded(Generic[T]):
    """Items of one pattern, in their order."""

    items: tuple[T, ...]
    pattern: str  # model.layers.{0-29}.mlp.up_proj, or the path itself where there is one item

    def __len__(self) -> int:
        return len(self.items)


def fold(
    items: Iterable[T], path: Callable[[T], str], alike: Callable[[T], Hashable]
) -> list[Folded[T]]:
    """The items in groups of the same pattern for which `alike` gives the same, as they come."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault((_NUMBER.sub("*", path(item)), alike(item)), []).append(item)
    return [Folded(tuple(group), _pattern([path(i) for i in group])) for group in groups.values()]


def without_layer(rule: str) -> str:
    """A rule's text without the number of the layer that it names."""
    return re.sub(r"layers_to_transform \d+", "layers_to_transform", rule)


def _pattern(paths: list[str]) -> str:
    """The common form of paths that differ in numbers alone, with the ranges of those."""
    if len(paths) == 1:
        return paths[0]
    numbers = [_NUMBER.findall(path) for path in paths]
    ranges = iter([_ranges(sorted({int(n) for n in column})) for column in zip(*numbers)])
    return _NUMBER.sub(lambda _: next(ranges), paths[0])


def _ranges(numbers: list[int]) -> str:
    """ "{0-3,7}"; one number stays as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    parts: list[tuple[int, int]] = []
    for n in numbers:
        if parts and n == parts[-1][1] + 1:
            parts[-1] = parts[-1][0], n
        else:
            parts.append((n, n))
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in parts]
    more = [*shown[:4], "…", *shown[-2:]] if len(shown) > 8 else shown
    return "{" + ",".join(more) + "}"
