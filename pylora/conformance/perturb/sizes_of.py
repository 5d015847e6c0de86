"""The sizes that a call of the protocol has, by name: what a trigger may wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Sizes = dict[str, int]


def layer(x: Any, W: Any, A: Any = None, B: Any = None) -> Sizes:
    found = {"m": x.shape[0], "k": x.shape[1], "d": W.shape[0]}
    return found if A is None else {**found, "r": A.shape[0]}


def _several(x: Any, W: Any, adapters: Any, *rest: Any) -> Sizes:
    ranks = [A.shape[0] for A, _, _ in adapters]
    return {**layer(x, W), "adapters": len(ranks), "rank": max(ranks, default=0)}


def _mixed(x: Any, W: Any, adapters: Any, rows: Any, *rest: Any) -> Sizes:
    rows = np.asarray(rows)
    breaks = np.flatnonzero(np.diff(rows)) + 1
    runs = np.diff(np.concatenate([[0], breaks, [len(rows)]])) if len(rows) else np.zeros(1, int)
    more = {"segments": len(runs), "rows of a segment": int(runs.max(initial=0))}
    return {**_several(x, W, adapters), **more}


def _loss(batches: Any, W: Any, A: Any, B: Any, scale: Any) -> Sizes:
    rows = [len(x) for x, _, _ in batches]
    sizes = {"d": W.shape[0], "k": W.shape[1], "r": A.shape[0]}
    return {**sizes, "batches": len(rows), "rows": max(rows, default=0)}


def _attention(x: Any, weights: Any, adapters: Any, s: Any) -> Sizes:
    ranks = [A.shape[0] for A, _, _ in adapters.values()]
    return {
        "positions": max(s.lengths),
        "sequences": len(s.lengths),
        "heads": s.heads,
        "heads of a group": s.heads // s.kv_heads,
        "key heads": s.kv_heads,
        "size of a head": s.head_dim,
        "inputs": x.shape[1],
        "rank": max(ranks, default=0),
    }


def _merge(W: Any, A: Any, B: Any, *rest: Any) -> Sizes:
    return {"d": W.shape[0], "k": W.shape[1], "r": A.shape[0], "elements": W.size}


SIZES: dict[str, Callable[..., Sizes]] = {
    "forward": lambda x, W, A, B, *rest: layer(x, W, A, B),
    "base": lambda x, W, *rest: layer(x, W),
    "backward": lambda dy, x, W, A, B, *rest: layer(x, W, A, B),
    "loss_gradients": _loss,
    "merge": _merge,
    "unmerge": _merge,
    "forward_stacked": _several,
    "forward_mixed": _mixed,
    "dropout_forward": lambda x, W, A, B, *rest: {**layer(x, W, A, B), "elements": x.size},
    "dropout_backward": lambda dy, x, W, A, B, *rest: {**layer(x, W, A, B), "elements": x.size},
    "attention": _attention,
    "attention_backward": lambda dy, *rest: _attention(*rest),
    "init": lambda d, k, r, *rest: {"d": d, "k": k, "r": r, "elements": r * k},
    "scaling": lambda alpha, r, use_rslora: {"r": r},
    "plan": lambda config, modules: {
        "modules": len(modules),
        "rank": int(config["r"]) if isinstance(config.get("r"), int) else 0,
        "targets": len(config.get("target_modules") or ()),
    },
    "load": lambda directory, modules: {
        "modules": len(modules),
        "d": max((d for d, _ in modules.values()), default=0),
        "k": max((k for _, k in modules.values()), default=0),
    },
}
# The array arguments of each method, by position.
ARRAYS: dict[str, tuple[str, ...]] = {
    "forward": ("x", "W", "A", "B", "", "bias"),
    "base": ("x", "W", "bias"),
    "backward": ("dy", "x", "W", "A", "B"),
    "merge": ("W", "A", "B"),
    "unmerge": ("W", "A", "B"),
    "forward_stacked": ("x", "W", "", "bias"),
    "forward_mixed": ("x", "W", "", "rows", "bias"),
    "dropout_forward": ("x", "W", "A", "B"),
    "dropout_backward": ("dy", "x", "W", "A", "B"),
    "attention": ("x",),
    "attention_backward": ("dy", "x"),
}
