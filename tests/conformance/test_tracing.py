"""Arrays that remember how they came about."""

from __future__ import annotations

import numpy as np
import pytest

from pylora.conformance import tracing
from pylora.conformance.testcase import Call
from pylora.conformance.tracing import Traced, formula, plain, steps


def result(value):
    call = Call("implementation", "forward", (), (), name="y")
    return tracing.result(value, call, [])


def texts(value):
    return [s.text for s in steps(value) if s.call is None]


def test_what_is_computed_from_a_result_is_remembered():
    y = result(np.arange(6.0).reshape(2, 3))
    z = 2 * y[:1] + y.copy().sum(axis=0)
    assert texts(z) == ["{}[{}]", "{} * {}", "{}.copy()", "{}.sum(axis={})", "{} + {}"]
    assert np.array_equal(plain(z), [[3, 7, 11]])


def test_an_implementation_gets_its_own_object_back():
    array = np.ones((2, 2))
    y, nested = result(array), result((array, [array], {"a": array}))
    assert isinstance(y, Traced) and plain(y) is array
    assert plain(nested)[0] is array and plain(nested)[2]["a"] is array
    assert not isinstance(plain([y + 1])[0], Traced)


def test_a_result_can_be_written_to_and_that_is_noted():
    log = []
    call = Call("implementation", "forward", (), (), name="y")
    array = np.zeros(3)
    y = tracing.result(array, call, log)
    y[1] = 5
    assert array[1] == 5 and len(log) == 1 and log[0].target is y


def test_a_formula_is_one_step():
    @formula
    def twice(a):
        """Twice."""
        return 2 * a

    y = twice(result(np.ones(2)))
    assert texts(y) == ["twice({})"] and y.step.function is twice


def test_where_the_trace_is_lost_the_numbers_are_left():
    y = result(np.ones(3))
    y += 1
    assert y.step is None and np.array_equal(plain(y), [2, 2, 2])
    assert np.asarray(y, np.float32).dtype == np.float32
    assert float(result(np.ones(3)).sum()) == 3.0 and f"{result(np.ones(3)).max():.1f}" == "1.0"


@pytest.mark.parametrize("value", [None, 3, "text", (1, 2), {"a": [1]}])
def test_what_is_no_array_stays_as_it_is(value):
    assert result(value) == value and plain(value) == value
