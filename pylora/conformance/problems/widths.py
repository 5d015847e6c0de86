"""Problems whose sums show in how many bits they are kept: long, and of one sign.

An accumulator of 16 bits stands still at 256 (bfloat16) or 2048 (float16) of the ones that are
added to it. One that is emptied into a wider one after some terms does not; for it there are sums
of a large term and many that are below half of the large one's last bit ("tilted"): what is lost
is up to 60 times that, beyond what rounding the result costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.problems.layers import np_dtype, st
from pylora.conformance.problems.sizes import FEW, THOROUGH, TINY
from pylora.conformance.testcase import Problem
from pylora.types import Array

KINDS = ("ones", "positive", "tilted")
LENGTHS = (600, 2049)
TILE = 64
BELOW = 0.9 * 2.0**-9  # of 1: less than half of bfloat16's last bit


def line(n: int, kind: str, rng: np.random.Generator) -> Array:
    """n terms, [n] float64."""
    if kind == "tilted":
        return np.where(np.arange(n) % TILE == 0, 1.0, BELOW)
    return np.ones(n) if kind == "ones" else rng.uniform(0.5, 1.5, n)


# The first factor along each dimension carries the terms; the others are near 1.
_FIRST = {"k": ("x", 1), "r": ("A", 0), "d": ("dy", 1), "m": ("dy", 0)}


def width(dtype: str, where: str, n: int, kind: str, seed: int = 0) -> Problem:
    """x, W, A, B, dy, two adapters and rows, with the dimension `where` of m, k, d, r long."""
    rng = np.random.default_rng([seed, n])
    s = {**TINY, where: n}
    fields: dict[str, Any] = {}
    for name, pair in {"x": "mk", "W": "dk", "A": "rk", "B": "dr", "dy": "md"}.items():
        a, b = pair[0], pair[1]
        array = np.ones((s[a], s[b])) if kind != "positive" else rng.uniform(0.5, 1.5, (s[a], s[b]))
        if _FIRST[where][0] == name:
            terms = line(n, kind, rng)
            array = array * (terms[:, None] if _FIRST[where][1] == 0 else terms[None])
        fields[name] = array.astype(np_dtype(dtype))
    adapters = [(fields["A"], fields["B"], 1.0), (fields["A"][:1], fields["B"][:, :1], 0.5)]
    rows = np.arange(s["m"]) % 3 - 1
    return Problem(**fields, adapters=adapters, rows=rows, scale=1.0, bias=None, seed=seed)


def widths(dtype: str, examples: int, dimensions: str = "mkdr") -> Iterator[Problem]:
    """Each dimension long, with each kind of terms."""
    lengths = LENGTHS if examples < THOROUGH else (*LENGTHS, 8193)
    for where in dimensions:
        for n in lengths[: 1 if examples < FEW else None]:
            for kind in KINDS:
                yield width(dtype, where, n, kind)


@st.composite  # type: ignore[untyped-decorator]
def any_width(draw, dtype: str, dimensions: str = "mkdr") -> Problem:  # type: ignore[no-untyped-def]
    """One dimension of 300 to 1500 terms."""
    where, kind = draw(st.sampled_from(tuple(dimensions))), draw(st.sampled_from(KINDS))
    return width(dtype, where, draw(st.integers(300, 1500)), kind, draw(st.integers(0, 99)))
