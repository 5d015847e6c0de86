"""Ways in which a result is wrong: its last element, a tile of it, or the scale that it was made
with. `ways(method)` lists those of a method of the protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Way = Callable[[Any, tuple[Any, ...], Callable[..., Any]], Any]  # of result, arguments, the method


def in_array(result: Any, change: Callable[[Any], Any], which: int) -> Any:
    """The result with one of its arrays changed; the last of them for -1."""
    if isinstance(result, np.ndarray):
        return change(np.array(result)) if result.size else result
    if isinstance(result, dict):
        keys = list(result)
        if not keys:
            return result
        return {**result, keys[-1]: in_array(result[keys[-1]], change, which)}
    if isinstance(result, (tuple, list)) and result:
        parts = list(result)
        at = which % len(parts)
        while parts[at] is None:  # as the gradient of what is not there
            at -= 1
        parts[at] = in_array(parts[at], change, which)
        return type(result)(parts)
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        return result * 2 + 1
    return result


def _at_end(value: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(a: Any) -> Any:
        flat = a.reshape(-1)
        flat[-1] = value(flat[-1])
        return a

    return change


def _tile(make: Callable[[Any], None]) -> Callable[[Any], Any]:
    """Changes the last rows, or columns where there are more of them."""

    def change(a: Any) -> Any:
        b = a if a.ndim < 2 or a.shape[0] >= a.shape[1] else a.T
        make(b)
        return a

    return change


def _zero(b: Any) -> None:
    b[-max(1, len(b) // 8) :] = 0


def _shift(b: Any) -> None:
    n = max(2, len(b) // 8)
    b[-n:] = np.roll(b[-n:], 1, axis=0) if len(b) > 1 else -b[-n:]


def _repeat(b: Any) -> None:
    n = max(1, len(b) // 2)
    b[-n:] = b[:n] if len(b) > 1 else -b


def _zeroed(a: Any) -> Any:
    return a.dtype.type(0) if hasattr(a, "dtype") else 0


_RESULTS: dict[str, Callable[[Any], Any]] = {
    "its last element is 0": _at_end(_zeroed),
    "its last element is doubled": _at_end(lambda v: v + v + _zeroed(v)),
    "its last tile is 0": _tile(_zero),
    "its last tile is shifted": _tile(_shift),
    "its last tile is the first again": _tile(_repeat),
}


def _other_scale(args: tuple[Any, ...], call: Callable[..., Any], method: str) -> Any:
    """The same call with another scale, where the method has one."""
    changed = list(args)
    at = {"forward": 4, "backward": 5, "merge": 3, "unmerge": 3, "loss_gradients": 4}.get(method)
    at = {"dropout_forward": 4, "dropout_backward": 5}.get(method, at)
    if at is not None:
        changed[at] = 1.0 if changed[at] != 1.0 else 0.5
        return call(*changed)
    if method in ("forward_stacked", "forward_mixed") and args[2]:
        A, B, s = args[2][-1]
        changed[2] = [*args[2][:-1], (A, B, 1.0 if s != 1.0 else 0.5)]
        return call(*changed)
    return None


def ways(method: str) -> dict[str, Way]:
    """By name: how a result of the method may be wrong."""
    found: dict[str, Way] = {}
    parts = {"backward": 3, "dropout_backward": 3, "loss_gradients": 2, "attention_backward": 2}
    count = parts.get(method, 1)
    for i in range(count):
        for name, change in _RESULTS.items():
            if method in ("scaling", "plan", "load") and name != "its last element is doubled":
                continue

            def way(result: Any, args: Any, call: Any, i: int = i, change: Any = change) -> Any:
                return in_array(result, change, i)

            found[f"of result {i} {name[4:]}" if count > 1 else name[4:]] = way
    if method in ("forward", "backward", "merge", "unmerge", "loss_gradients", "forward_stacked",
                  "forward_mixed", "dropout_forward", "dropout_backward"):  # fmt: skip

        def scaled(result: Any, args: Any, call: Any) -> Any:
            other = _other_scale(args, call, method)
            return result if other is None else other

        found["another scale"] = scaled
    if method in ("plan", "load"):
        found = {"last module missing": lambda r, a, c: dict(list(r.items())[:-1]), **found}
    return found
