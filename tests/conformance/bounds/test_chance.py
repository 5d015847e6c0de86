"""Bounds on chance: they are bounds, and not much more than the truth."""

from __future__ import annotations

from math import comb, exp, isnan, log
from pathlib import Path

import numpy as np
import pytest

from pylora.conformance.bounds import chance

DOCS = Path(__file__).parents[3] / "docs" / "conformance.md"


def exact(n, share):
    """The chances of 0 .. n."""
    return np.array([comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)])


@pytest.mark.parametrize("n, share", [(1, 0.5), (7, 0.3), (40, 0.5), (200, 0.03), (200, 0.9)])
def test_no_surprise_is_commoner_than_it_says(n, share):
    cells, nats = exact(n, share), chance.surprise(np.arange(n + 1), n, share)
    for level in (0.5, 2, 5, 10, 20):
        assert cells[nats >= level].sum() <= 2 * exp(-level) * (1 + 1e-9)


def test_half_the_surprise_is_enough_for_pairs_that_share_elements():
    """Both rare, one apart, in 12 bits: every outcome counted."""
    n, share = 12, 0.3
    tail: dict[int, float] = {}
    for word in range(1 << n):
        bits = np.array([word >> i & 1 for i in range(n)])
        hits = int((bits[1:] & bits[:-1]).sum())
        ones = int(bits.sum())
        tail[hits] = tail.get(hits, 0) + share**ones * (1 - share) ** (n - ones)
    for level in (0.5, 1, 2, 4):
        far = [h for h in tail if chance.surprise(h, n - 1, share**2) / 2 >= level]
        assert sum(tail[h] for h in far) <= 2 * exp(-level)


@pytest.mark.parametrize("n, share, other", [(200, 0.5, 0.8), (300, 0.1, 0.3), (300, 0.4, 0.15)])
def test_power_is_a_lower_bound_and_a_near_one(n, share, other):
    level = chance.limit(10, 1e-6)
    cells, nats = exact(n, other), chance.surprise(np.arange(n + 1), n, share)
    truth = cells[nats >= level].sum()
    assert chance.power(n, share, other, level) <= truth
    assert 1 - truth <= 1 - chance.power(n, share, other, level) < 1
    low, high = chance.ends(n, share, level)
    assert (nats[low : high + 1] < level).all() and nats[high + 1] >= level > nats[high]


def test_what_is_seen_is_seen():
    for n, share, below in ((500, 0.5, False), (2000, 0.1, False), (2000, 0.1, True)):
        at = chance.seen(n, share, 100, below=below)
        assert (at < share) == below
        level = chance.limit(100)
        assert chance.power(n, share, at, level) >= 1 - chance.MISSED
        assert chance.power(n, share, (3 * share + at) / 4, level) < 1 - chance.MISSED
    assert isnan(chance.seen(20, 0.5, 100))  # twenty equal bits are nothing special among so many
    assert chance.limit(1, 2 * exp(-3)) == pytest.approx(3)
    assert chance.divergence(0.5, 0.25) == pytest.approx(0.5 * log(2) + 0.5 * log(0.5 / 0.75))


def test_the_table_in_the_docs_is_this_one():
    said = "python -m pylora.conformance.bounds.chance has another table"
    assert chance.table() in DOCS.read_text(encoding="utf-8"), said
