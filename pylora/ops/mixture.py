"""Which experts each token goes to, and with which weights; forward and backward of that choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.types import Array, brief


@dataclass(frozen=True, eq=False)
class Choice:
    """The experts of m tokens. `rows[e]` are the tokens of expert e, ascending, and `places[e]`
    which of their top_k choices it is."""

    __repr__ = brief

    probabilities: Array  # [m, experts]
    chosen: np.ndarray  # int64 [m, top_k], the likeliest first
    weights: Array  # [m, top_k]
    rows: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]


def choose(logits: Array, top_k: int, normalize: bool, to_numpy: Any, xp: Any) -> Choice:
    """softmax over the experts, the top_k largest (of equal ones the first), and their weights,
    divided by their sum with `normalize`."""
    top = logits.real.max(axis=1, keepdims=True)
    e = xp.exp(logits - top)
    p = e / e.sum(axis=1, keepdims=True)
    host = np.asarray(to_numpy(p)).real
    chosen = np.argsort(-host, axis=1, kind="stable")[:, :top_k]
    w = p[xp.arange(p.shape[0])[:, None], xp.asarray(chosen)]
    if normalize:
        w = w / w.sum(axis=1, keepdims=True)
    return routed(p, chosen, w)


def routed(probabilities: Array, chosen: np.ndarray, weights: Array) -> Choice:
    """The choice sorted by experts."""
    rows, places = [], []
    for expert in range(probabilities.shape[1]):
        r, c = np.nonzero(chosen == expert)
        rows.append(r)
        places.append(c)
    return Choice(probabilities, chosen, weights, tuple(rows), tuple(places))


def choose_backward(dw: Array, choice: Choice, normalize: bool, xp: Any) -> Array:
    """dw [m, top_k] of the weights -> dlogits [m, experts]. The choice itself has no gradient."""
    p, chosen = choice.probabilities, xp.asarray(choice.chosen)
    rows = xp.arange(p.shape[0])[:, None]
    if normalize:
        total = p[rows, chosen].sum(axis=1, keepdims=True)
        dw = (dw - (dw * choice.weights).sum(axis=1, keepdims=True)) / total
    dp = xp.zeros_like(p)
    dp[rows, chosen] = dw
    return p * (dp - (dp * p).sum(axis=1, keepdims=True))
