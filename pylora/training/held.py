"""The part of an adapter that stays as it is while the rest is trained.

An adapter that began with a part of the base's weights (`--init pissa`, `olora`) has that part once
more, with the other sign: rows of A and columns of B behind the first `n`, which nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylora.types import Array


class Held:
    """Of each module the first n rows of A and columns of B are trained; {} holds nothing."""

    def __init__(self, held: Mapping[str, int], parameters: Mapping[str, Array]) -> None:
        """`parameters`: the arrays themselves, by "<module path>.A" and ".B"."""
        self._parts: dict[str, Any] = {}
        for path, n in held.items():
            self._parts[f"{path}.A"] = (slice(n, None),)
            self._parts[f"{path}.B"] = (slice(None), slice(n, None))
        self._kept = {name: parameters[name][part].copy() for name, part in self._parts.items()}

    def clear(self, grads: Mapping[str, Array]) -> None:
        """Makes the gradients of what is held zero, so that it does not count in their norm."""
        for name, part in self._parts.items():
            grads[name][part] = 0

    def restore(self, parameters: Mapping[str, Array]) -> None:
        """Undoes what an update did all the same: weight decay."""
        for name, part in self._parts.items():
            parameters[name][part] = self._kept[name]
