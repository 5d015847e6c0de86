"""Inputs on which a change must show, or it is no change: wider than what the laws draw.

The rule for an equivalent mutant: over `CALLS` calls of each method that it could touch it gives
the same bits as what it was made from, and raises where that raises. The calls are drawn here, not
by the laws' strategies: every dtype, sizes from 0 to 300 and now and then 5000 in one dimension,
every kind of element and NaN, infinities and zeros of either sign among them, every layout, any
scale. A mutant that differs, but nowhere by more than the bound of the result, computes the same
thing another way, which the specification allows: it is `within`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.perturb import corpus_ops
from pylora.conformance.problems.layers import KINDS, SCALES, elements
from pylora.conformance.problems.layouts import LAYOUTS, laid_out
from pylora.conformance.protocol import AttentionShape
from pylora.types import Array

CALLS = 200
_DTYPES = ("float32", "float64", "bfloat16")
_ODD = (np.nan, np.inf, -np.inf, 0.0, -0.0)


class Draw:
    """One random call after another."""

    def __init__(self, seed: int, dtypes: tuple[str, ...] = _DTYPES) -> None:
        self.rng, self.dtypes = np.random.default_rng(seed), dtypes

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def size(self, low: int = 1) -> int:
        return max(
            low,
            int(self.rng.integers(2, 18) if self.rng.random() < 0.7 else 300 ** self.rng.random()),
        )

    def sizes(self) -> tuple[int, int, int, int]:
        m, k, d, r = self.size(0), self.size(), self.size(), self.size()
        if self.rng.random() < 0.05:
            grown = [3, 4, 5, 2]
            grown[int(self.rng.integers(4))] = 5000
            m, k, d, r = grown
        return (0 if self.rng.random() < 0.05 else m), k, d, r

    def array(self, shape: tuple[int, ...], dtype: str, odd: bool) -> Array:
        kind = self.pick(KINDS) if odd else self.pick(("normal", "integers", "positive", "wide"))
        a = elements(self.rng, shape, kind, dtype)
        if odd and a.size and self.rng.random() < 0.3:
            a.reshape(-1)[int(self.rng.integers(a.size))] = self.pick(_ODD)
        return laid_out(a, self.pick(LAYOUTS)) if odd and self.rng.random() < 0.5 else a

    def layer(self) -> dict[str, Any]:
        m, k, d, r = self.sizes()
        dtype, odd = self.pick(self.dtypes), self.rng.random() < 0.5
        shapes = {"x": (m, k), "W": (d, k), "A": (r, k), "B": (d, r), "dy": (m, d), "bias": (d,)}
        found: dict[str, Any] = {n: self.array(s, dtype, odd) for n, s in shapes.items()}
        if self.rng.random() < 0.1:
            found["B"] = np.zeros_like(found["B"])
        if self.rng.random() < 0.3:
            found["bias"] = None
        scale = self.pick(SCALES) if self.rng.random() < 0.7 else float(self.rng.normal() * 4)
        return {**found, "scale": scale, "dtype": dtype}

    def several(self) -> tuple[list[Any], dict[str, Any]]:
        p = self.layer()
        (d, k), ranks = p["W"].shape, [self.size() for _ in range(int(self.rng.integers(0, 6)))]
        return [
            (
                self.array((r, k), p["dtype"], False),
                self.array((d, r), p["dtype"], False),
                self.pick(SCALES),
            )
            for r in ranks
        ], p


def calls(
    method: str, dtypes: tuple[str, ...] = _DTYPES, number: int = CALLS, seed: int = 77
) -> Iterator[tuple[Any, ...]]:
    """Arguments of so many calls."""
    draw = Draw(seed, dtypes)
    for _ in range(number):
        yield _arguments(method, draw)


def calls_of(method: str) -> bool:
    """Whether calls of it are drawn here."""
    return bool(_arguments(method, Draw(1)))


def _arguments(method: str, draw: Draw) -> tuple[Any, ...]:
    if method in corpus_ops.METHODS:
        return corpus_ops.arguments(method, draw)
    p = draw.layer()
    x, W, A, B, dy, bias, s = (p[n] for n in ("x", "W", "A", "B", "dy", "bias", "scale"))
    rate, seed = draw.pick((0.0, 0.5, 0.1, 0.9)), int(draw.rng.integers(2**31))
    if method in ("forward_stacked", "forward_mixed"):
        adapters, p = draw.several()
        x, W, bias = p["x"], p["W"], p["bias"]
        if method == "forward_stacked":
            return x, W, adapters, bias
        return x, W, adapters, draw.rng.integers(-1, max(len(adapters), 0), len(x)), bias
    if method in ("attention", "attention_backward"):
        return _attention(method, draw)
    simple: dict[str, tuple[Any, ...]] = {
        "forward": (x, W, A, B, s, bias),
        "base": (x, W, bias),
        "stored": (W,),
        "backward": (dy, x, W, A, B, s),
        "loss_gradients": (
            [(x, dy, draw.rng.random(len(x)) < 0.7), (x, dy, np.ones(len(x), bool))],
            W,
            A,
            B,
            s,
        ),
        "scaling": (draw.pick((1, 8, 16, 2.5, 100)), draw.size(), bool(draw.rng.random() < 0.5)),
        "init": (draw.size(), draw.size(), draw.size(), seed, draw.pick(("kaiming", "gaussian"))),
        "merge": (W, A, B, s),
        "unmerge": (W, A, B, s),
        "module": (W, bias),
        "dropout_forward": (x, W, A, B, s, rate, seed),
        "dropout_backward": (dy, x, W, A, B, s, rate, seed),
    }
    return simple.get(method, ())


def _attention(method: str, draw: Draw) -> tuple[Any, ...]:
    kv, group, D = draw.pick((1, 2, 3)), draw.pick((1, 2, 4)), 2 * draw.pick((1, 2, 3, 5, 16))
    heads, hidden, dtype = kv * group, draw.size(), draw.pick(draw.dtypes)
    lengths = tuple(draw.pick((1, 2, 3, 7, 20)) for _ in range(draw.pick((1, 2, 4))))
    out = {"q_proj": heads * D, "k_proj": kv * D, "v_proj": kv * D, "o_proj": hidden}
    inp = {"q_proj": hidden, "k_proj": hidden, "v_proj": hidden, "o_proj": heads * D}
    weights = {n: draw.array((out[n], inp[n]), dtype, False) for n in out}
    adapters = {
        n: (
            draw.array((2, inp[n]), dtype, False),
            draw.array((out[n], 2), dtype, False),
            draw.pick(SCALES),
        )
        for n in out
        if draw.rng.random() < 0.6
    }
    x, dy = (draw.array((sum(lengths), hidden), dtype, False) for _ in range(2))
    shape = AttentionShape(heads, kv, D, lengths, draw.pick((10000.0, 100.0)))
    first = (x,) if method == "attention" else (dy, x)
    return (*first, weights, adapters, shape)


def differs(mutant: Any, methods: frozenset[str], right: Any) -> str:
    """How a mutant differs from what it was made from: it is the same, within the bounds of the
    results everywhere, or beyond them somewhere; in these words."""
    found = "same"
    if not any(calls_of(method) for method in methods):
        return "beyond"  # nothing is drawn here for them: every change counts
    dtypes = tuple(d for d in _DTYPES if d in right.dtypes)
    for method in sorted(methods):
        if method == "module":
            found = _worse(found, _modules(mutant, right, dtypes))
            continue
        if not calls_of(method):
            continue
        for args in calls(method, dtypes):
            with np.errstate(all="ignore"):
                got, want = _result(mutant, method, args), _result(right, method, args)
                if method == "merge" and not isinstance(want, Exception) and got is not None:
                    found = _worse(found, _unmerged(mutant, right, args, got, want))
                found = _worse(found, _compared(method, args, got, want))
            if found == "beyond":
                return found
    return found


def _worse(a: str, b: str) -> str:
    order = ("same", "within", "beyond")
    return order[max(order.index(a), order.index(b))]


def _result(of: Any, method: str, args: tuple[Any, ...]) -> Any:
    try:
        return getattr(of, method)(*args)
    except Exception as error:
        return error


def _unmerged(mutant: Any, right: Any, args: Any, got: Any, want: Any) -> str:
    if isinstance(got, Exception):
        return "beyond"
    back = _result(mutant, "unmerge", (got[0], *args[1:], got[1]))
    return _compared(
        "unmerge", args, back, _result(right, "unmerge", (want[0], *args[1:], want[1]))
    )


def _compared(method: str, args: tuple[Any, ...], got: Any, want: Any) -> str:
    if isinstance(want, Exception) or isinstance(got, Exception):
        return "same" if isinstance(want, Exception) and isinstance(got, Exception) else "beyond"
    a, b = _flat(got), _flat(want)
    if len(a) != len(b) or any(p.shape != q.shape or p.dtype != q.dtype for p, q in zip(a, b)):
        return "beyond"
    if all(p.tobytes() == q.tobytes() for p, q in zip(a, b)):
        return "same"
    limits = _limits(method, args)
    if limits is None:
        return "beyond"
    for p, q, limit in zip(a, b, limits):
        u, v = p.astype(np.float64), q.astype(np.float64)
        near = (np.abs(u - v) <= limit) | (u == v) | (np.isnan(u) & np.isnan(v))
        if not near.all():
            return "beyond"
    return "within"


def _flat(result: Any) -> list[Array]:
    if isinstance(result, np.ndarray):
        return [np.ascontiguousarray(result)]
    if isinstance(result, (tuple, list)):
        return [a for part in result for a in _flat(part)]
    if isinstance(result, dict):
        return [a for key in sorted(result) for a in _flat(result[key])]
    if isinstance(result, (bool, int, float)):
        return [np.asarray(result)]
    if hasattr(result, "position"):  # a residue
        return [np.asarray(result.position), np.asarray(result.bits)]
    return []


def _limits(method: str, args: tuple[Any, ...]) -> Any:
    if method == "forward":
        x, W, A, B, s, bias = args
        return [bounds.forward(x, W, [(A, B, s)], bias)]
    if method == "base":
        return [bounds.forward(args[0], args[1], [], args[2])]
    if method == "backward":
        return list(bounds.backward(*args))
    if method == "forward_stacked":
        return [bounds.forward(args[0], args[1], args[2], args[3])]
    return None


def _modules(mutant: Any, right: Any, dtypes: tuple[str, ...]) -> str:
    """Modules through their life: attached, merged, unmerged, detached, attached again."""
    for args in calls("module", dtypes, 40):
        draw = Draw(len(args[0]))
        (d, k), dtype = args[0].shape, str(args[0].dtype)
        low = [
            (draw.array((2, k), dtype, False), draw.array((d, 2), dtype, False), s)
            for s in (2.0, -0.3)
        ]
        x, outputs = draw.array((3, k), dtype, False), []
        for of in (mutant, right):
            seen: list[Any] = []
            try:
                module = of.module(args[0].copy(), args[1])
                steps = (
                    "f",
                    "u",
                    "a0",
                    "f",
                    "m",
                    "f",
                    "m",
                    "f",
                    "u",
                    "f",
                    "d",
                    "f",
                    "a1",
                    "f",
                    "m",
                    "a0",
                    "f",
                    "d",
                    "f",
                )
                for step in steps:
                    seen.append(_step(module, step, low, x))
            except Exception as error:
                seen.append(type(error).__name__)
            outputs.append(seen)
        if outputs[0] != outputs[1]:
            return "beyond"
    return "same"


def _step(module: Any, step: str, low: list[Any], x: Array) -> bytes:
    if step[0] == "a":
        try:
            module.attach(*low[int(step[1])])
        except Exception as error:
            return type(error).__name__.encode()
    elif step == "d":
        module.detach()
    elif step in "mu":
        try:
            getattr(module, {"m": "merge", "u": "unmerge"}[step])()
        except Exception as error:
            return type(error).__name__.encode()
    else:
        return bytes(np.ascontiguousarray(module.forward(x)).tobytes())
    return bytes(np.ascontiguousarray(module.weight()).tobytes())
