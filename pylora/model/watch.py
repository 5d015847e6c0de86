"""The inputs of a model's linear modules, as they are while it runs.

For who needs them once, before training: a module's inputs are handed to a function with its path.
Nothing is changed by watching, and nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pylora.types import Array

Seen = Callable[[str, Array], None]  # (module path, its x [m, k])


class _Watching:
    """A backend that says what its linear modules are given."""

    def __init__(self, ops: Any, paths: dict[int, str], seen: Seen) -> None:
        self._ops, self._paths, self._seen = ops, paths, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def _say(
        self, x: Array, projections: Sequence[Any], norm: Any = None, dtype: Any = None
    ) -> None:
        if norm is not None:
            x, _ = self._ops.norm_forward(x, norm, dtype)
        for p in projections:
            if id(p.W) in self._paths:
                self._seen(self._paths[id(p.W)], x)

    def linear_forward(self, x: Array, projections: Sequence[Any]) -> Any:
        self._say(x, projections)
        return self._ops.linear_forward(x, projections)

    def qkv_forward(
        self, x: Array, projections: Sequence[Any], norm: Any, rotation: Any, dtype: Any
    ) -> Any:
        self._say(x, projections, norm, dtype)
        return self._ops.qkv_forward(x, projections, norm, rotation, dtype)

    def gate_up_forward(
        self, x: Array, projections: Sequence[Any], norm: Any, dtype: Any, activation: str
    ) -> Any:
        self._say(x, projections, norm, dtype)
        return self._ops.gate_up_forward(x, projections, norm, dtype, activation)


@contextmanager
def watching(model: Any, seen: Seen) -> Iterator[None]:
    """While the block runs, `seen(path, x)` is called with what each linear module is given."""
    parts = [m for b in model.blocks for m in (b.attention, b.mlp, *b.numbered)] + [model.lm_head]
    linear = [m for b in model.blocks for m in b.numbered] + [model.lm_head]
    ops = _Watching(model.ops, {id(m.W): m.path for m in linear}, seen)
    for part in parts:
        part.ops = ops
    try:
        yield
    finally:
        for part in parts:
            part.ops = model.ops
