"""Laws of initial values as random numbers: their distribution to its tails, and that the elements
of A, and the A's of different seeds, have nothing to do with each other.

Every element is turned into u, uniform on 0 .. 1 if the element is distributed as it should be (its
distribution function); u gives a sign and two bits of its magnitude, which are fair coins. What is
counted of them is in battery.py, what that shows in bounds/chance.py.
"""

from __future__ import annotations

import math

import numpy as np

from pylora.conformance.bounds import chance
from pylora.conformance.laws import battery
from pylora.conformance.laws.law import Law
from pylora.conformance.laws.streams import compared
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

SHAPES = ((16, 512), (256, 256), (64, 1024), (8, 4096), (33, 500), (512, 64))  # (r, k)
LARGE = ((64, 1024), (16, 4096), (512, 160))
CELLS = 64  # equal parts of 0 .. 1 whose elements are counted
TAILS = 14  # and those beyond 2⁻ʲ of either end
FINEST = 16  # bits: that many different values are the least, equally likely ones
ROUNDING = 2.0**-20  # beyond the edge that float32 may round an element to


def uniform(A: Array, k: int, method: str) -> Array:
    """The distribution function of each element, float64 in 0 .. 1; r is A's number of rows."""
    if method == "kaiming":
        return np.clip((np.asarray(A, np.float64) * math.sqrt(k) + 1) / 2, 0, 1)
    z = np.asarray(A, np.float64) * A.shape[0] / math.sqrt(2)
    return np.array([math.erfc(-v) / 2 for v in z.reshape(-1)]).reshape(A.shape)


def coins(A: Array, k: int, method: str) -> dict[str, Array]:
    """Three bits of each element."""
    return of_u(uniform(A, k, method))


def of_u(u: Array) -> dict[str, Array]:
    """The same of numbers that are uniform on 0 .. 1."""
    magnitude = 2 * np.abs(u - 0.5)
    return {
        "signs": u < 0.5,
        "magnitudes": magnitude < 0.5,
        "second bits of magnitudes": (4 * magnitude).astype(np.int64) % 2 == 0,
    }


def _inits(shapes: tuple[tuple[int, int], ...]) -> object:
    return st.builds(
        lambda shape, seed, method: Problem(shape=shape, seed=seed, method=method),
        pick(shapes),
        st.integers(0, 2**31 - 1),
        pick(("kaiming", "gaussian")),
    )


def _made(t: Trial, p: Problem, seed: int) -> Array:
    r, k = p.shape
    return np.asarray(t.init(3, k, r, seed, p.method)[0], np.float64)


def _independent(t: Trial, p: Problem) -> None:
    A = _made(t, p, p.seed)
    for name, found in (
        (n, battery.whole(b, 0.5)) for n, b in coins(A, p.shape[1], p.method).items()
    ):
        if said := found.broken():
            t.fail(f"{name} of A {list(p.shape)}, {p.method}, seed {p.seed}: {said}")


def cells(u: Array) -> battery.Found:
    """Counts of the elements in equal parts, below each part's end, and in both tails."""
    found, flat, n = battery.Found(), u.reshape(-1), u.size
    parts = np.bincount(np.minimum((flat * CELLS).astype(int), CELLS - 1), minlength=CELLS)
    found.add(f"u in part {{}} of {CELLS}", parts, n, 1 / CELLS)
    found.add(
        f"u below part {{}} of {CELLS}",
        np.cumsum(parts)[:-1],
        n,
        np.arange(1, CELLS) / CELLS,
        np.arange(1, CELLS),
    )
    for end, tail in (("lower", flat), ("upper", 1 - flat)):
        ends = 2.0 ** -np.arange(1, TAILS + 1)
        counts = np.array([(tail < e).sum() for e in ends])
        found.add(f"u in the {end} 2^-{{}}", counts, n, ends, np.arange(1, TAILS + 1))
    middle = np.array([(np.abs(flat - 0.5) < e / 2).sum() for e in ends])
    found.add("u within 2^-{} of the middle", middle, n, ends, np.arange(1, TAILS + 1))
    return found


def _distribution(t: Trial, p: Problem) -> None:
    A = _made(t, p, p.seed)
    found = cells(uniform(A, p.shape[1], p.method))
    if said := found.broken():
        t.fail(f"elements of A {list(p.shape)}, {p.method}, seed {p.seed}, as u = F(a): {said}")


def _related(t: Trial, p: Problem) -> None:
    compared(t, p, lambda seed: coins(_made(t, p, seed), p.shape[1], p.method)["signs"])
    compared(t, p, lambda seed: coins(_made(t, p, seed), p.shape[1], p.method)["magnitudes"])


def _resolution(t: Trial, p: Problem) -> None:
    r, k = p.shape
    raw = np.asarray(t.init(3, k, r, p.seed, p.method)[0])
    if raw.dtype.itemsize < 4:
        raise NotTested("A is kept in 16 bits")
    flat = raw.reshape(-1)[: 1 << 13]
    again = flat.size - np.unique(flat).size
    # An element repeats one of those before it with a chance of at most n 2^-FINEST, whatever they
    # are: the number of repeats is, at worst, a binomial's.
    share = flat.size * 2.0**-FINEST
    nats = float(chance.surprise(again, flat.size, share))
    if again > flat.size * share and nats >= chance.limit(1):
        t.fail(
            f"{again} of {flat.size} elements of A repeat another: they have fewer than "
            f"2^{FINEST} values"
        )


def _alone(t: Trial, p: Problem) -> None:
    """The same A after others were made, with other threads and for another d."""
    r, k = p.shape
    A = _made(t, p, p.seed)
    _made(t, p, p.seed + 5)
    if callable(getattr(t.implementation, "set_num_threads", None)):
        t.set_num_threads(2)
        t.expect("A with two threads", _made(t, p, p.seed), A)
        t.set_num_threads(1)
    t.expect("A after others were made", _made(t, p, p.seed), A)


def _free(t: Trial, p: Problem) -> None:
    if "false" not in getattr(t.implementation, "init_methods", ()):
        raise NotTested('init has no method "false"')
    k, r = p.shape
    A, B = t.init(k, 40, r, p.seed, "false")
    for name, a, fan in (("A", np.asarray(A), 40), ("B", np.asarray(B), r)):
        edge = 1 / math.sqrt(fan)
        if float(np.abs(a).max()) > edge * (1 + ROUNDING):
            t.fail(f"|{name}| is beyond {edge:.6g}")
    u = uniform(np.asarray(B), r, "kaiming")
    if said := cells(u).broken() or battery.whole(u < 0.5, 0.5).broken():
        t.fail(f'elements of B, [{k}, {r}], with "false", seed {p.seed}: {said}')
    both = battery.Found()
    n = min(A.size, B.size)
    own, other = (np.asarray(a).reshape(-1)[:n].reshape(1, n) < 0 for a in (A, B))
    battery.across(both, "signs of A against those of B", own, other, 0.5)
    if said := both.broken():
        t.fail(said)


LAWS = (
    Law(
        "I10",
        "The elements of A have nothing to do with each other.",
        "signs, magnitudes and their second bits are fair coins: what R1 counts, together 10⁻¹⁵",
        "rows are repeated, copies of each other or negated, A has a rank of few, or a block comes "
        "again",
        ("I-9",),
        ("init",),
        lambda: _inits(SHAPES),
        _independent,
        (),
        cost=12,
    ),
    Law(
        "I11",
        "The elements of A are distributed as the method says, to the tails.",
        "u = F(a): in 64 equal parts, below each, and within 2⁻ʲ of 0, 1/2 and 1, j up to 14; "
        "exact binomials, together 10⁻¹⁵",
        "normal in place of uniform or the reverse, two values, a triangle, tails that are cut",
        ("I-2", "I-3"),
        ("init",),
        lambda: _inits(LARGE),
        _distribution,
        (),
        cost=12,
    ),
    Law(
        "I12",
        "Initial values of different seeds have nothing to do with each other.",
        "signs and magnitudes of A(seed) against those of the seeds of R2, at every shift",
        "seed bits are ignored, or a seed's values are another's, shifted: two runs start alike",
        ("I-9", "I-6", "R-6"),
        ("init",),
        lambda: _inits(((8, 512), (64, 64))),
        _related,
        (),
        cost=25,
    ),
    Law(
        "I13",
        "The elements of A are as fine as float32.",
        "of 8192 elements not so many repeat another as with 2¹⁶ equally likely values",
        "they went through 16 bits, or come from a table",
        ("I-9",),
        ("init",),
        lambda: _inits(((16, 512), (8, 1024))),
        _resolution,
        (),
        cost=5,
    ),
    Law(
        "I14",
        "Initial values do not depend on what was made before, or on threads.",
        "init(seed) after init(seed + 5), and with two threads, has the same bits",
        "a run cannot be repeated on another machine, or when a module is added",
        ("I-6",),
        ("init",),
        lambda: _inits(((4, 33), (64, 512))),
        _alone,
        (),
        cost=4,
    ),
    Law(
        "I15",
        "With init_lora_weights = false B is random too.",
        "B uniform in ±1 / sqrt(r), A in ±1 / sqrt(k), as I10 and I11, and unlike each other",
        "tests that start from such an adapter test less than they seem to",
        ("I-4", "I-9"),
        ("init",),
        lambda: _inits(((8, 4096), (16, 2048))),
        _free,
        (),
        cost=20,
    ),
)
