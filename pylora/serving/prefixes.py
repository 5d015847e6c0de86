"""What earlier requests have computed and nobody uses now: prefixes, to begin with instead of anew.

A prefix is known by what answered it, the content of adapters and their weights, and by its token
ids: requests of different adapters never share one, and the same adapter under two names does. The
keys and values of a prefix are those that computing it again would give, bit for bit. The memory
belongs to it only as long as nobody else needs it: the one that was used longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from pylora.serving.arena import Arena, Extent

SHORTEST = 16  # tokens; less is not worth a look


@dataclass(eq=False)
class Prefix:
    """Tokens whose keys and values are in an extent."""

    key: str  # what answered: see adapters.py
    ids: np.ndarray  # int64 [n]
    extent: Extent


class Prefixes:
    """Those that are kept, in the order of their last use."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._kept: OrderedDict[int, Prefix] = OrderedDict()  # by id(), the oldest first
        self._of: dict[str, list[Prefix]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def rows(self) -> int:
        """Rows of the arena that prefixes have."""
        return sum(prefix.extent.size for prefix in self._kept.values())

    def find(self, key: str, ids: np.ndarray) -> tuple[Prefix | None, int]:
        """The prefix that has most of these first tokens, and how many."""
        best, most = None, SHORTEST - 1
        for prefix in self._of.get(key, ()):
            n = common(prefix.ids, ids)
            if n > most:
                best, most = prefix, n
        if best is None:
            return None, 0
        self._kept.move_to_end(id(best))
        return best, most

    def add(self, prefix: Prefix) -> None:
        """Keeps it, unless another has all of it; those that it has all of go."""
        if prefix.ids.size < SHORTEST:
            self._arena.give(prefix.extent)
            return
        for other in list(self._of.get(prefix.key, ())):
            n = common(other.ids, prefix.ids)
            if n == prefix.ids.size:
                self._arena.give(prefix.extent)
                self._kept.move_to_end(id(other))
                return
            if n == other.ids.size:
                self.drop(other)
        self._arena.shrink(prefix.extent, prefix.ids.size)
        self._kept[id(prefix)] = prefix
        self._of.setdefault(prefix.key, []).append(prefix)

    def release(self, prefix: Prefix) -> Extent:
        """Forgets it; its extent is the caller's now."""
        del self._kept[id(prefix)]
        same = self._of[prefix.key]
        same.remove(prefix)
        if not same:
            del self._of[prefix.key]
        return prefix.extent

    def drop(self, prefix: Prefix) -> None:
        """Forgets it and gives its memory back."""
        self._arena.give(self.release(prefix))

    def drop_oldest(self, spared: Prefix | None = None) -> bool:
        """Gives the memory of the one back that was used longest ago; False if there is none."""
        for prefix in self._kept.values():
            if prefix is not spared:
                self.drop(prefix)
                return True
        return False


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many first elements are the same."""
    n = min(a.size, b.size)
    differ = a[:n] != b[:n]
    at = int(differ.argmax()) if n else 0
    return at if n and differ[at] else n
