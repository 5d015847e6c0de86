"""The form of what a method returns: shapes and dtypes, for the methods whose results are arrays.

`form(method, arguments)` is a `Form` for an array, a tuple for a tuple of fixed length, a list for
a list, and a dict for a mapping with exactly these keys; None for a method that is not listed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """An array's shape, and its dtype; None: any."""

    shape: tuple[int, ...]
    dtype: Any


def _like(a: Any) -> Form:
    return Form(a.shape, a.dtype)


def _product(a: tuple[Any, ...]) -> Form:
    return Form((a[0].shape[0], a[1].shape[0]), a[0].dtype)


def _bias_of(a: tuple[Any, ...]) -> Form | None:
    return Form((a[2],), None) if a[7] else None


_FORMS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "block": lambda a: _like(a[0]),
    "layer": lambda a: _like(a[0]),
    "initial": lambda a: (Form((a[4], a[3]), None), Form((a[2], a[4]), None), _bias_of(a)),
    "backward_mixed": lambda a: (_like(a[1]), [(_like(A), _like(B)) for A, B, _ in a[3]]),
    "bias_forward": _product,
    "bias_mixed": _product,
    "bias_stacked": _product,
    "bias_backward": lambda a: tuple(_like(a[i]) for i in (1, 3, 4, 5)),
    "bias_merge": lambda a: (_like(a[0]), Form((a[0].shape[0],), a[0].dtype)),
    "embedding_forward": lambda a: Form((len(a[0]), a[1].shape[1]), a[1].dtype),
    "embedding_backward": lambda a: (_like(a[3]), _like(a[4])),
    "embedding_merge": lambda a: _like(a[0]),
    "embedding_init": lambda a: (Form((a[2], a[0]), None), Form((a[1], a[2]), None)),
    "embedding_dropout": lambda a: Form((len(a[0]), a[1].shape[1]), a[1].dtype),
    "embed": lambda a: Form((len(a[0]), a[1].shape[1]), a[1].dtype),
    "dora_norm": lambda a: Form((a[0].shape[0],), a[0].dtype),
    "dora_forward": _product,
    "dora_backward": lambda a: tuple(_like(a[i]) for i in (1, 3, 4, 5)),
    "dora_unmerge": lambda a: _like(a[0]),
    "dropout_mask": lambda a: Form(tuple(a[0]), bool),
    "rms_norm": lambda a: _like(a[0]),
    "swiglu": lambda a: _like(a[0]),
    "swiglu_backward": lambda a: (_like(a[1]), _like(a[2])),
    "rope": lambda a: _like(a[0]),
    "rope_part": lambda a: _like(a[0]),
    "layer_norm": lambda a: _like(a[0]),
    "layer_norm_backward": lambda a: _like(a[1]),
    "activation": lambda a: _like(a[1]),
    "soft_cap": lambda a: _like(a[0]),
    "soft_cap_backward": lambda a: _like(a[1]),
    "experts": lambda a: _like(a[0]),
    "cross_entropy": lambda a: (Form((len(a[0]),), a[0].dtype), _like(a[0])),
    "adamw": lambda a: (_like(a[0]), _like(a[2]), _like(a[3])),
    "clip": lambda a: [_like(g) for g in a[0]],
    "adapter_step": lambda a: {name: _like(p) for name, p in a[0].items()},
}


def form(method: str, arguments: tuple[Any, ...]) -> Any:
    """See the file's header."""
    made = _FORMS.get(method)
    return None if made is None else made(arguments)
