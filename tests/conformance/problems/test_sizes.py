"""The lists of sizes: every limit is crossed, and what is promised to be exact is."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws import allowed
from pylora.conformance.problems import sizes
from pylora.conformance.testcase import Trial


def test_each_limit_is_met_and_crossed():
    walked = sizes.walk(1000, 65536)
    assert set(walked) >= {n + i for n in sizes.LIMITS for i in (-1, 0, 1)}
    walked = sizes.walk(100, 65536)
    assert set(walked) >= {n + i for n in sizes.LIMITS[:-1] for i in (0, 1)}
    assert max(walked) > 65537 and walked[0] == max(walked)
    assert set(sizes.walk(100, 65536, dtype="float64")) >= {n + 1 for n in sizes.PASSED}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_each_dimension_is_large_in_turn_and_can_be_made_smaller(dtype):
    seen = {"m": 0, "k": 0, "d": 0, "r": 0}
    for p in sizes.layers(dtype, 100):
        for name, n in zip("mkdr", (*p.x.shape, *p.B.shape)):
            seen[name] = max(seen[name], n)
        if "size" in vars(p) and p.size > 60000:
            small = p.resized(7)
            assert small.size == 7 and max(small.x.shape) <= 7
    assert min(seen.values()) > 65537


def test_thinned_sums_fit_into_bfloat16_and_miss_no_edge():
    trial = Trial(Correct())
    for p in (sizes.layer("bfloat16", 0, name, **{name: 65537}) for name in "kr"):
        assert np.max(allowed.forward(trial, p)) == 0.0
    a = sizes.thinned(sizes.whole(np.random.default_rng(0), (4, 5000), "float32"), 1)
    assert (np.flatnonzero((a != 0).any(axis=0)) == sizes.edges(5000)).all()
