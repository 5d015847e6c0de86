"""The counts of bits: right numbers, quiet on fair coins, and loud on what they are made for."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from pylora.conformance.bounds import chance
from pylora.conformance.laws import battery


@pytest.mark.parametrize("fair", [True, False])
def test_sums_over_pairs_are_those_of_loops(rng, fair):
    a, b = rng.random((2, 37)) < 0.4
    hit = (lambda x, y: x == y) if fair else (lambda x, y: x and y)
    counts, trials = battery._together(a, b, fair)
    for d in range(37):
        pairs = [hit(a[i], b[i + d]) for i in range(37 - d)]
        assert (counts[d], trials[d]) == (sum(pairs), len(pairs))
    seen = []

    class Spy(battery.Found):
        def add(self, what, count, n, share, names=None, halved=False):
            seen.append((count, np.broadcast_to(n, np.shape(count))))

    battery._mirrored(Spy(), a, fair, 0.5)
    battery._dyadic(Spy(), a, fair, 0.5)
    for s in range(73):
        pairs = [hit(a[i], a[s - i]) for i in range(37) if i < s - i < 37]
        assert (seen[0][0][s], seen[0][1][s]) == (sum(pairs), len(pairs))
    for d in range(1, 32):
        pairs = [hit(a[i], a[i ^ d]) for i in range(32) if i < i ^ d]
        assert (seen[1][0][d - 1], seen[1][1][d - 1]) == (sum(pairs), 16 if pairs else 0)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.75])
def test_fair_and_unfair_coins_are_far_from_an_alarm(share):
    rng, worst = np.random.default_rng(5), 0.0
    for shape in ((256, 64), (64, 256), (128, 128), (1000, 33), (3, 5), (1, 40), (40, 1)) * 3:
        found = battery.whole(rng.random(shape) < share, share)
        assert not found.broken() and found.tests > 20
        worst = max(worst, found.worst - np.log(found.tests))
    assert worst < 9  # nats beyond what so many counts have: 35 would be an alarm


@pytest.mark.parametrize("share", [0.5, 0.1, 0.75])
@pytest.mark.parametrize("way", ["copy", "flip", "rows", "columns", "more"])
def test_what_hangs_together_is_found(share, way):
    rng = np.random.default_rng(6)
    bits = rng.random((256, 128)) < share
    if way == "copy":
        bits[200:] = bits[50:106]
    elif way == "flip":
        bits = np.concatenate([bits[:128], bits[:128][::-1, ::-1]])
    elif way == "rows":
        bits[::2] = bits[1::2]
    elif way == "columns":
        bits[:, 100] = bits[:, 3]
        bits[:, 101] = bits[:, 4] = bits[:, 3]
    else:
        bits = rng.random((256, 128)) < share + 0.04
    assert battery.whole(bits, share).broken()


def test_the_correlation_that_is_promised_is_seen():
    """In a hundred tries, where one in a thousand may miss it."""
    n, tests, missed = 4096, 100_000, 0
    rng, correlation = np.random.default_rng(7), chance.correlation(4096, 100_000)
    for _ in range(100):
        bits = rng.random(n + 1) < 0.5
        equal = rng.random(n) < (1 + correlation) / 2
        bits[1:] = bits[0] ^ np.logical_xor.accumulate(~equal)
        counts, trials = battery._together(bits, bits, True)
        nats = chance.surprise(counts[1], trials[1], 0.5)
        missed += nats < chance.limit(tests)
    assert missed <= 2


def test_a_linear_stream_has_a_low_rank_and_coins_do_not():
    rng = np.random.default_rng(8)
    taps, n = rng.random(40) < 0.5, battery.WIDTH * battery.WIDTH * 2
    bits = np.zeros(n, bool)
    bits[:40] = rng.random(40) < 0.5
    for i in range(40, n):
        bits[i] = np.logical_xor.reduce(bits[i - 40 : i] & taps)
    found = battery.Found()
    battery._rank(found, bits)
    assert "over GF(2)" in found.broken()
    quiet = battery.Found()
    battery._rank(quiet, rng.random(n) < 0.5)
    assert quiet.tests == 1 and not quiet.broken()


def test_chances_of_so_many_ones():
    for n, share in ((1, 0.5), (16, 0.1), (512, 0.9)):
        cells = battery.binomial(n, share)
        assert cells.sum() == pytest.approx(1) and cells @ np.arange(n + 1) == pytest.approx(
            n * share
        )
