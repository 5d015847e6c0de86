"""Laws of chance for what a module or an embedding starts with: distribution, independence, seeds.

The same is counted as in initial.py, which is of `init`; here it is of the methods that make the
arrays of a module by its path, of every implementation that has them. No promise of bits is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pylora.conformance.laws import battery
from pylora.conformance.laws.initial import cells, of_u
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.masks import NAMED
from pylora.conformance.laws.streams import compared
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array


def _seeds() -> Any:
    return st.integers(0, 2**31 - 1)


Drawn = list[tuple[str, Array, str, float]]  # name, array, "uniform" or "normal", how wide
Make = Callable[[Trial, Problem, int], Drawn]
_SIZES = ((512, 512, 32), (1024, 256, 64), (256, 2048, 24))  # d, k, r


def _of_module(t: Trial, p: Problem, seed: int) -> Drawn:
    """The random arrays that a module starts with."""
    d, k, r = p.sizes
    A, B, bias = t.initial(p.kind, p.path, d, k, r, seed, p.method, p.lora_bias)
    free = p.method == "false"
    if p.kind == "embedding":
        return [("B", B, "normal", 1.0), *([("A", A, "normal", 1.0)] if free else ())]
    normal = p.method == "gaussian"
    of_A = ("normal", 1 / r) if normal else ("uniform", 1 / math.sqrt(k))
    out: Drawn = [("A", A, *of_A)]
    if free:
        out.append(("B", B, "uniform", 1 / math.sqrt(r)))
        if bias is not None:
            row = np.asarray(bias).reshape(1, -1)
            out.append(("the bias of B", row, "uniform", 1 / math.sqrt(r)))
    return out


def _modules(sizes: tuple[tuple[int, int, int], ...] = _SIZES) -> Any:
    hows = (
        ("linear", "kaiming"),
        ("linear", "gaussian"),
        ("linear", "false"),
        ("embedding", "kaiming"),
        ("embedding", "false"),
    )
    return st.builds(
        lambda how, size, path, seed: Problem(
            kind=how[0], method=how[1], lora_bias=how == hows[2], sizes=size, path=path, seed=seed
        ),
        pick(hows),
        pick(sizes),
        pick(NAMED),
        _seeds(),
    )


def _module_kinds(dtype: str, examples: int) -> Iterator[Problem]:
    for i, (kind, method) in enumerate((("linear", "false"), ("embedding", "false"))):
        yield Problem(
            kind=kind, method=method, lora_bias=not i, sizes=_SIZES[0], path=NAMED[i], seed=i
        )


def _of_embedding(t: Trial, p: Problem, seed: int) -> Drawn:
    """The random arrays that an embedding's adapter starts with."""
    hidden, vocab, r = p.sizes
    A, B = t.embedding_init(vocab, hidden, r, seed, p.method == "false")
    out: Drawn = [("B", B, "normal", 1.0)]
    return [*out, ("A", A, "normal", 1.0)] if p.method == "false" else out


def _embeddings(sizes: tuple[tuple[int, int, int], ...] = _SIZES) -> Any:
    return st.builds(
        lambda random, size, seed: Problem(
            method="false" if random else "kaiming", sizes=size, seed=seed
        ),
        st.booleans(),
        pick(sizes),
        _seeds(),
    )


def _embedding_kinds(dtype: str, examples: int) -> Iterator[Problem]:
    yield Problem(method="false", sizes=_SIZES[0], seed=1)


def unit(array: Any, kind: str, width: float) -> Array:
    """The distribution function of each element, [rows,columns]."""
    a = np.asarray(array, np.float64)
    if kind == "uniform":
        return np.clip((a / width + 1) / 2, 0, 1)
    z = a / (width * math.sqrt(2))
    return np.array([math.erfc(-v) / 2 for v in z.reshape(-1).tolist()]).reshape(a.shape)


def _random(make: Make) -> Callable[[Trial, Problem], None]:
    def check(t: Trial, p: Problem) -> None:
        drawn = make(t, p, p.seed)
        said_of = f"{vars(p).get('path', 'an embedding')!r}, {p.method}, seed {p.seed}"
        for name, array, kind, width in drawn:
            if np.asarray(array).dtype.itemsize < 4:
                raise NotTested(f"{name} is kept in 16 bits")
            u = unit(array, kind, width)
            if said := cells(u).broken():
                t.fail(f"elements of {name} {list(u.shape)} of {said_of}, as u = F(a): {said}")
            for what, bits in of_u(u).items():
                if said := battery.whole(bits, 0.5).broken():
                    t.fail(f"{what} of {name} {list(u.shape)} of {said_of}: {said}")
        for i, (name, array, *_) in enumerate(drawn):
            for other_name, other, *_ in drawn[:i]:
                _strangers(t, f"{name} and {other_name} of {said_of}", array, other)

    return check


def _strangers(t: Trial, what: str, a: Any, b: Any) -> None:
    n = min(np.asarray(a).size, np.asarray(b).size)
    one, other = (np.signbit(np.asarray(v, np.float64)).reshape(-1)[:n][None] for v in (a, b))
    found = battery.Found()
    battery.across(found, f"signs of {what}", one, other, 0.5)
    battery.across(found, f"signs of {what}, one backwards", one, other[:, ::-1], 0.5)
    if said := found.broken():
        t.fail(said)


def _of_seeds(make: Make) -> Callable[[Trial, Problem], None]:
    """Signs of the first array, and magnitudes of the last."""

    def check(t: Trial, p: Problem) -> None:
        def bits(seed: int, at: int, what: str) -> Array:
            _, array, kind, width = make(t, p, seed)[at]
            return of_u(unit(array, kind, width))[what]

        q = p.replaced(shape=p.sizes[:2])
        compared(t, q, lambda seed: bits(seed, 0, "signs"))
        compared(t, q, lambda seed: bits(seed, -1, "magnitudes"))

    return check


_SMALL = ((64, 64, 32), (40, 100, 48))
MODULE, EMBEDDING = ("initial",), ("embedding_init",)
COUNTED = "u = F(a) in 64 parts and in the tails, as I11; signs, magnitudes and second bits as I10"
LAWS = (
    Law(
        "I18",
        "What a module starts with is random in every element.",
        f"of A, B and the bias of initial(path): {COUNTED}; A, B and the bias unlike each other",
        "rows are copies or the negative of others, a cheap normal, one stream for A and B",
        ("I-9", "I-2", "I-3", "I-4", "I-5"),
        MODULE,
        _modules,
        _random(_of_module),
        (),
        covering=_module_kinds,
        cost=50,
    ),
    Law(
        "I19",
        "What a module starts with has nothing to do with what it starts with from another seed.",
        "signs and magnitudes of initial(path, seed) against those of R2's seeds, at every shift",
        "seed bits are ignored, or a seed's values are another's, shifted",
        ("I-9", "I-6", "R-6"),
        MODULE,
        lambda: _modules(_SMALL),
        _of_seeds(_of_module),
        (),
        cost=50,
    ),
    Law(
        "I20",
        "What an embedding's adapter starts with is random in every element.",
        f"of B, and of A where it is random, of embedding_init: {COUNTED}",
        "rows of B are copies or the negative of others, or B is uniform",
        ("I-9", "I-5"),
        EMBEDDING,
        _embeddings,
        _random(_of_embedding),
        (),
        covering=_embedding_kinds,
        cost=50,
    ),
    Law(
        "I21",
        "Embeddings' adapters of different seeds have nothing to do with each other.",
        "as I19, of embedding_init",
        "seed bits are ignored: two runs start alike",
        ("I-9", "I-6", "R-6"),
        EMBEDDING,
        lambda: _embeddings(_SMALL),
        _of_seeds(_of_embedding),
        (),
        cost=50,
    ),
)
