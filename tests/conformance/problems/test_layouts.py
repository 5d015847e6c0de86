"""Layouts: the same numbers, elsewhere in memory, and memory that is watched."""

from __future__ import annotations

import numpy as np
import pytest

from pylora.conformance.problems.layouts import LAYOUTS, Guard, laid_out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (6,), (0, 4)])
def test_the_numbers_are_the_same(layout, shape, rng):
    a = rng.normal(size=shape).astype(np.float32)
    b = laid_out(a, layout)
    assert b.shape == a.shape and b.dtype == a.dtype
    if "broadcast" not in layout:
        assert np.array_equal(a, b)


def test_each_is_what_its_name_says(rng):
    a = rng.normal(size=(4, 6)).astype(np.float64)
    of = {layout: laid_out(a, layout) for layout in LAYOUTS}
    assert of["F"].flags.f_contiguous and of["upside down"].strides[0] < 0 < of["F"].strides[0]
    assert of["mirrored"].strides[1] < 0 and not of["unaligned"].flags.aligned
    assert of["broadcast rows"].strides[0] == 0 and of["broadcast columns"].strides[1] == 0
    assert not of["readonly"].flags.writeable and of["every other row"].strides[0] == 96
    assert len({v.strides + (v.flags.writeable, v.flags.aligned) for v in of.values()}) >= 10


def test_a_guard_sees_what_is_written_beside(rng):
    a = laid_out(rng.normal(size=(3, 3)).astype(np.float32), "columns")
    guard = Guard.of(a)
    assert guard.untouched
    guard.memory[0, -1] = 0  # NaN before, and no part of a
    assert not guard.untouched
