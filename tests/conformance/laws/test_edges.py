"""float16's and bfloat16's one rounding, and that refusing a rank of 0 is as good as taking it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
ml_dtypes = pytest.importorskip("ml_dtypes")

from pylora.conformance import run
from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.edges import round_to


def test_bfloat16_is_rounded_once_to_nearest_even(rng):
    finite = np.arange(2**16) % 2**15 < 0x7F80
    every = np.flatnonzero(finite).astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    numbers = np.sort(every)
    assert np.array_equal(round_to(numbers, "bfloat16"), numbers)
    numbers = np.unique(numbers)
    i = rng.integers(0, len(numbers) - 1, 5000)
    low, high = numbers[i], numbers[i + 1]
    for share in (0.25, 0.5 - 2.0**-40, 0.5 + 2.0**-40, 0.75):
        want = low if share < 0.5 else high
        assert np.array_equal(round_to(low + share * (high - low), "bfloat16"), want)
    middle = round_to((low + high) / 2, "bfloat16")
    bits = middle.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert ((middle == low) | (middle == high)).all() and (bits % 2 == 0).all()


def test_beyond_the_largest_is_infinity():
    top = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    values = np.array([top, top * (1 + 2.0**-9), top * (1 + 2.0**-8), -top * 2])
    assert round_to(values, "bfloat16").tolist() == [top, top, np.inf, -np.inf]
    assert round_to(np.array([65519.0, 65520.0]), "float16").tolist() == [65504, np.inf]


class Refuses(Correct):
    def _check(self, *adapters):
        if any(not A.shape[0] for A, *_ in adapters):
            raise ValueError("a rank of 0")

    def forward(self, x, W, A, B, scale, bias=None):
        self._check((A, B, scale))
        return super().forward(x, W, A, B, scale, bias)

    def forward_mixed(self, x, W, adapters, rows, bias=None):
        self._check(*adapters)
        return super().forward_mixed(x, W, adapters, rows, bias)

    def backward_mixed(self, dy, x, W, adapters, rows):
        self._check(*adapters)
        return super().backward_mixed(dy, x, W, adapters, rows)


@pytest.mark.parametrize("made", [Correct, Refuses])
def test_rank_0_may_be_refused_or_be_the_base(made):
    report = run(made, ["H1", "H2", "H3"], examples=12)
    assert [o.status for o in report.outcomes] == ["passed"] * 3
