"""Laws of what the module at a path starts with: which numbers, where bits are promised, and that
no two modules and no two arrays start alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.laws import numbers
from pylora.conformance.laws.dropout import UNLIKELY
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.masks import PATHS
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import Problem, Trial
from pylora.types import Array

METHODS = ("kaiming", "gaussian", "false")
_SEEDS = (0, 7, 2**31, 2**32 + 1, 2**64 - 1)
_NAMED = tuple(path for path in PATHS if path)
_SHOWN = 48  # elements of each array that are compared: those at its start and at its end
_CHUNK = 65536


def _problem(kind: str, sizes: tuple[int, int, int], **more: Any) -> Problem:
    d, k, r = sizes
    given = {"path": _NAMED[0], "seed": 7, "method": "kaiming", "lora_bias": False, "other": None}
    return Problem(kind=kind, d=d, k=k, r=r, **{**given, **more})


@st.composite  # type: ignore[untyped-decorator]
def _modules(draw: Any, sides: tuple[tuple[int, int, int], ...] = ()) -> Problem:
    """A module by its path: how large, of which kind, how it starts; and another path."""
    kind, path = draw(pick(("linear", "linear", "embedding"))), draw(pick(_NAMED))
    method = draw(pick(METHODS if kind == "linear" else ("kaiming", "false")))
    return _problem(
        kind,
        draw(pick(sides)) if sides else tuple(draw(pick((1, 2, 3, 5, 12))) for _ in range(3)),
        path=path,
        other=draw(pick(tuple(p for p in _NAMED if p != path))),
        seed=draw(pick(_SEEDS)),
        method=method,
        lora_bias=kind == "linear" and method != "gaussian" and draw(st.booleans()),
    )


def _large(dtype: str, examples: int) -> Iterator[Problem]:
    """Past a chunk of 2¹⁶ elements and of two; what else can be large lies in the number alone."""
    for k in (_CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 3):
        yield _problem("linear", (1, k, 1))
        yield _problem("linear", (1, k, 1), method="gaussian")
        yield _problem("embedding", (k, 1, 1))


def _begun(t: Trial, p: Problem, **changed: Any) -> Any:
    q = p.replaced(**changed)
    return t.initial(q.kind, q.path, q.d, q.k, q.r, q.seed, q.method, q.lora_bias)


def _rules(p: Problem) -> tuple[tuple[str, tuple[str, float] | None], ...]:
    """Of A, B and the bias of B: the stream's name, and the distribution or None for zeros."""
    name, free = f"init/{p.path}", p.method == "false"
    if p.kind == "embedding":
        return (name, ("normal", 1.0) if free else None), (f"{name}/B", ("normal", 1.0))
    A = ("normal", 1 / p.r) if p.method == "gaussian" else ("uniform", 1 / math.sqrt(p.k))
    B = ("uniform", 1 / math.sqrt(p.r)) if free else None
    return (name, A), (f"{name}/B", B), (f"{name}/bias", B)


def _bits(t: Trial, p: Problem) -> None:
    got = _begun(t, p)
    for i, (name, rule) in enumerate(_rules(p)):
        if i == 2 and not p.lora_bias:
            if got[2] is not None:
                t.fail("initial gave a bias of B that was not asked for")
            continue
        n = int(np.asarray(got[i]).size)
        at = range(n) if n <= 2 * _SHOWN else [*range(_SHOWN), *range(n - _SHOWN, n)]
        want = np.zeros(len(at), np.float32)
        if rule is not None:
            want = numbers.values(p.seed, name, rule[0], rule[1], at)
        where = np.unravel_index(np.array(at), np.asarray(got[i]).shape)
        t.expect(("A", "B", "the bias of B")[i], got[i], want, at=where)


def _signs(a: Any) -> Array:
    return np.signbit(np.asarray(a, np.float64)).reshape(-1)


def _apart(t: Trial, what: str, a: Any, b: Any) -> None:
    """The signs of two arrays are fair coins of their own: equal at half of the places, at every
    shift up to 8, forwards and backwards (Hoeffding)."""
    x, y = _signs(a), _signs(b)
    n = min(len(x), len(y))
    x, y = x[:n], y[:n]
    off = math.sqrt(n * math.log(2 * 34 / UNLIKELY) / 2) / n
    for turned in (y, y[::-1]):
        for shift in range(-8, 9):
            share = float((x == np.roll(turned, shift)).mean())
            if abs(share - 0.5) > off:
                said = f"the signs of {what} are equal at {share:.3f} of {n} places, shifted by"
                t.fail(f"{said} {shift}; independent ones at 0.5 ± {off:.2f}")


def _unlike(t: Trial, p: Problem) -> None:
    first = _begun(t, p)
    second = _begun(t, p, path=p.other)
    drawn = [
        i for i, (_, rule) in enumerate(_rules(p)) if rule is not None and first[i] is not None
    ]
    for i in drawn:
        _apart(
            t, f"{'AB'[i : i + 1] or 'the bias'} of {p.path!r} and {p.other!r}", first[i], second[i]
        )
    for i, j in zip(drawn, drawn[1:]):
        _apart(t, f"two arrays of {p.path!r}", first[i], first[j])
    again = _begun(t, p)
    for i in drawn:
        t.expect("the same module again, after another", again, np.asarray(first[i]), item=(i,))


_WIDE = ((512, 512, 8), (640, 700, 5))
LAWS = (
    Law(
        "I16",
        "A module starts with the numbers that the specification says, bit for bit.",
        "A from the stream init/<path>, B from init/<path>/B, its bias from "
        "init/<path>/bias, row by row: u of 52 bits, (2u - 1) b or z(u) σ in float64, then "
        "float32; embeddings too",
        "another stream, fewer bits, float32 on the way, another quantile, or columns for rows: a "
        "run is not reproduced",
        ("I-8", "R-3", "R-4", "R-5", "R-1", "R-2"),
        ("initial", "bits"),
        _modules,
        _bits,
        (),
        covering=_large,
    ),
    Law(
        "I17",
        "No two modules start alike, and no two arrays of one.",
        "signs of A, of B and of its bias, of two paths that are alike and of one: equal "
        "at half of the places at every shift up to 8 (Hoeffding, chance 10⁻¹⁸); made again, the "
        "same",
        "the path does not enter the key, or only its end or its length does; B is A's stream",
        ("I-9", "I-6", "I-4"),
        ("initial",),
        lambda: _modules(_WIDE),
        _unlike,
        (),
    ),
)
