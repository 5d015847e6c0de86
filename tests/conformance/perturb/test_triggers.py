"""Methods that are wrong under one condition: right without it, wrong with it."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.correct.plain import Correct
from pylora.conformance.perturb import triggers
from pylora.conformance.problems.layouts import laid_out
from pylora.conformance.problems.sizes import layer


def forward(of, p):
    return of.forward(p.x, p.W, p.A, p.B, p.scale, p.bias)


def find(kind, text):
    (found,) = [m for m in triggers.mutants(kind) if m.text == text]
    return found.make()


def test_there_are_thousands_and_each_has_its_own_name():
    every = [m for kind in triggers.KINDS for m in triggers.mutants(kind)]
    assert len(every) > 5000
    assert len({m.id for m in every}) == len(every)


@pytest.mark.parametrize("name", "mkdr")
def test_beyond_a_size_it_is_wrong_and_up_to_it_right(name):
    made = find("size", f"forward with {name} > 16: last element is doubled")
    for size, right in ((15, True), (16, True), (17, False), (40, False)):
        p = layer("float32", 0, **{name: size})
        assert np.array_equal(forward(made, p), forward(Correct(), p)) == right


def test_in_one_dtype_alone():
    made = find("dtype", "forward in bfloat16: another scale")
    for dtype in ("float32", "float64", "bfloat16"):
        p = layer(dtype)
        assert np.array_equal(forward(made, p), forward(Correct(), p)) == (dtype != "bfloat16")


def test_for_one_layout_alone():
    made = find("layout", "forward, W column-major: read as if it were contiguous")
    p = layer("float32", 1)
    right = forward(Correct(), p)
    assert np.array_equal(forward(made, p), right)
    assert np.array_equal(forward(made, p.replaced(x=laid_out(p.x, "F"))), right)
    assert not np.array_equal(forward(made, p.replaced(W=laid_out(p.W, "F"))), right)


def test_after_some_calls_and_at_every_third():
    later, third = (
        find("call", f"forward {when}: last element is doubled")
        for when in ("after 3 calls", "every 3 calls")
    )
    p = layer("float32", 1)
    right = forward(Correct(), p)
    assert [np.array_equal(forward(later, p), right) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [np.array_equal(forward(third, p), right) for _ in range(4)] == [True, True, False, True]


def test_for_one_kind_of_value():
    made = find("value", "forward, scale negative: another scale")
    p = layer("float32", 1)
    for scale, right in ((2.0, True), (-2.0, False)):
        q = p.replaced(scale=scale)
        assert np.array_equal(forward(made, q), forward(Correct(), q)) == right


def test_a_sample_is_of_a_seed():
    every = triggers.mutants("position")
    assert triggers.sample(every, 9, 3) == triggers.sample(every, 9, 3)
    assert triggers.sample(every, 9, 3) != triggers.sample(every, 9, 4)
    assert len(triggers.sample(every, 10**6, 0)) == len(every)
