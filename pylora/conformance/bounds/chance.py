"""What laws about chance may claim: how often they cry wolf, and what they are sure to see.

Everything is counted. A law's hypothesis makes each count an exact binomial, and one inequality
does the rest (Chernoff 1952, in Hoeffding's form, 1963, theorem 1): for K ~ Bin(n, π) and
k <= n π <= K',

    P(K <= k) <= exp(-n D(k/n ‖ π))        P(K >= K') <= exp(-n D(K'/n ‖ π))
    D(a ‖ b) = a ln(a/b) + (1 - a) ln((1 - a)/(1 - b))

No normal approximation, no constant of Berry and Esseen, nothing asymptotic.

**False alarms.** `surprise(k, n, π) = n D(k/n ‖ π)` in nats. Of a correct implementation
P(surprise >= L) <= 2 exp(-L), both tails together. An example that looks at T counts, however
dependent they are on each other, is a false alarm with a chance of at most 2 T exp(-L) (union
bound): `limit(T)` is the L that makes this ALARM. A law looks at up to three such sets of counts in
an example, so that with 10,000 examples it raises one with a chance of at most 3 · 10⁻¹¹, and the
eighteen laws about chance together with less than 10⁻⁹.

Where a count is not binomial itself but the sum of two that are, each of about n/2 independent
trials (pairs that share an element, told apart by every second one: see `battery.py`), then by
Cauchy and Schwarz E exp(λ(K₁ + K₂)) <= sqrt(E exp(2λ K₁) E exp(2λ K₂)), which is the bound above
with n/2 for n: half the surprise.

The same inequality bounds a sum of weights, one for each of n independent draws from cells of
known shares (`weighted`): P(sum >= n t) <= exp(-n I(t)), with I(t) the maximum over λ >= 0 of
λ t - ln Σ share e^(λ w). It is searched for; any λ gives a bound, so that what the search misses
costs power only.

**Power.** A wrong implementation makes the same count a Bin(n, π') with π' ≠ π. The law sees it
unless the count stays between the ends of the interval of surprise < L; let k* be the end that lies
between n π and n π'. By the same inequality it is missed with a chance of at most
exp(-n D(k*/n ‖ π')). `seen` finds the π' nearest to π for which that is below MISSED. For two bits
that are equal with the chance π' and should be with 1/2 the correlation is 2 π' - 1. All figures in
the docs are made by these functions (`python -m pylora.conformance.bounds.chance`).
"""

from __future__ import annotations

import math

import numpy as np

from pylora.types import Array

ALARM = 1e-15  # the chance that one example fails a correct implementation
MISSED = 1e-3  # the chance that one example passes an implementation that is as wrong as is said


def divergence(a: Array | float, b: Array | float) -> Array:
    """D(a ‖ b) of two shares, in nats; 0 ln 0 is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(a > 0, a * np.log(a / b), 0.0)
        second = np.where(a < 1, (1 - a) * np.log((1 - a) / (1 - b)), 0.0)
    return np.maximum(first + second, 0.0)


def surprise(count: Array | float, n: Array | float, share: Array | float) -> Array:
    """n D(count/n ‖ share): of Bin(n, share) this is L or more with a chance of at most
    2 exp(-L). 0 where n is 0."""
    count, n = np.asarray(count, np.float64), np.asarray(n, np.float64)
    return n * divergence(np.clip(count / np.maximum(n, 1), 0, 1), share)


def _rate(t: float, weights: Array, shares: Array) -> float:
    """I(t) for t at or above the mean of the weights, in nats for each draw: the function of λ is
    concave, and its slope at λ is t less the mean under shares e^(λ w)."""

    def slope(by: float) -> tuple[float, float]:
        top = float((by * weights).max())
        tilted = shares * np.exp(by * weights - top)
        total = float(tilted.sum())
        mean = float((tilted * weights).sum()) / total
        return t - mean, by * t - (math.log(total) + top)

    low, high = 0.0, 1.0 / float(np.abs(weights).max())
    for _ in range(60):
        if slope(high)[0] <= 0:
            break
        low, high = high, 2 * high
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if slope(half)[0] > 0 else (low, half)
    return max(0.0, slope(low)[1])


def weighted(counts: Array, weights: Array, shares: Array) -> float:
    """Nats of the sum of the weights of `counts` draws from cells of these shares: L or more with a
    chance of at most 2 exp(-L)."""
    n = int(counts.sum())
    mean, expected = float(counts @ weights) / n, float(shares @ weights)
    sign = 1.0 if mean >= expected else -1.0
    return n * _rate(sign * mean, sign * weights, shares)


def weighted_power(n: int, weights: Array, shares: Array, other: Array, level: float) -> float:
    """A lower bound on the chance that n draws from cells of the shares `other` have a sum of
    weights of `level` nats or more as draws from cells of `shares`."""
    sign = 1.0 if other @ weights >= shares @ weights else -1.0
    w = sign * weights
    near, far = float(shares @ w), float(other @ w)
    if n * _rate(far, w, shares) < level:
        return 0.0
    for _ in range(50):
        half = (near + far) / 2
        near, far = (near, half) if n * _rate(half, w, shares) >= level else (half, far)
    return float(-math.expm1(-n * _rate(-far, -w, other)))


def limit(tests: int, alarm: float = ALARM) -> float:
    """L: of so many counts one has this surprise with a chance of at most `alarm`."""
    return math.log(2 * tests / alarm)


def ends(n: int, share: float, level: float) -> tuple[int, int]:
    """The smallest and the largest count whose surprise is below `level`."""
    middle = round(n * share)

    def first(inside: int, outside: int) -> int:
        while abs(outside - inside) > 1:
            half = (inside + outside) // 2
            inside, outside = (
                (half, outside) if surprise(half, n, share) < level else (inside, half)
            )
        return inside

    return first(middle, -1), first(middle, n + 1)


def power(n: int, share: float, other: float, level: float) -> float:
    """A lower bound on the chance that Bin(n, other) has a surprise of `level` or more as a count
    of Bin(n, share)."""
    low, high = ends(n, share, level)
    end = low if other < share else high  # the last count that is let through
    if (low == 0 if other < share else high == n) or (end / n < other) != (other > share):
        return 0.0
    return float(-math.expm1(-float(surprise(end, n, other))))


def seen(n: int, share: float, tests: int, *, below: bool = False, alarm: float = ALARM) -> float:
    """The share nearest to `share`, above it or `below` it, that an example of so many counts, this
    one of n trials, sees with a chance of 1 - MISSED at least; NaN if it sees none."""
    level = limit(tests, alarm)
    end = 0.0 if below else 1.0
    if power(n, share, end, level) < 1 - MISSED:
        return math.nan
    near, far = share, end
    for _ in range(50):
        half = (near + far) / 2
        near, far = (near, half) if power(n, share, half, level) >= 1 - MISSED else (half, far)
    return far


def correlation(n: int, tests: int) -> float:
    """The smallest correlation of two bits, at n places, that an example of so many counts sees."""
    return 2 * seen(n, 0.5, tests) - 1


def table() -> str:
    """What the laws are sure to see, in Markdown, for docs/conformance.md."""
    rows = ["| | elements | counts | sees, with a chance of 0.999 |", "|---|---|---|---|"]
    for n, tests in ((65536, 410_000), (8192, 600_000), (4096, 570_000)):
        seen_here = f"two bits that are equal with correlation {correlation(n, tests):.2g}"
        rows.append(f"| pairs at one distance | {n} | {tests} | {seen_here} |")
    for n in (128, 512, 4096):
        seen_here = f"two rows of this length with correlation {correlation(n, 410_000):.2g}"
        rows.append(f"| rows with each other | {n} | 410000 | {seen_here} |")
    for p, n in ((0.5, 65536), (0.1, 65536), (0.01, 65536)):
        high = seen(n, p, 13)
        rows.append(f"| elements dropped, p = {p} | {n} | 13 | a chance of {high:.4g} |")
    n, share = 65536, 2.0**-10
    high, low = (round(n * seen(n, share, 230, below=b)) for b in (False, True))
    said = f"{high} in place of {n * share:.0f}, or {low}"
    rows.append(f"| elements of A beyond 2⁻¹⁰ | {n} | 230 | {said} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
