"""The programs that are printed: what they say, and that they tell wrong from right."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.correct.plain import Correct
from pylora.conformance.correct.rounded import Int8
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.mutants.registry import REGISTRY
from pylora.conformance.running.counterexample import fails, right
from pylora.conformance.running.runner import run_law


def program(implementation, law, **more):
    outcome = run_law(implementation, LAWS[law], **more)
    assert outcome.status in ("FAILED", "BROKEN")
    assert fails(outcome.counterexample, type(implementation)()), outcome.counterexample
    assert not fails(outcome.counterexample, right(implementation)), outcome.counterexample
    return outcome.counterexample


def mutant(name):
    return REGISTRY[name].make()


def test_both_sides_are_computed_and_nothing_of_the_kit_is_imported():
    source = program(mutant("bias-scaled"), "F1")
    assert "want = np.asarray(exact_forward(x, W, [(A, B, 2.0)], bias))" in source
    assert "def exact_forward(x, W, adapters, bias=None):" in source
    assert [line for line in source.splitlines() if "pylora" in line] == [
        "from pylora.conformance.mutants.linear import BiasScaled"
    ]


def test_results_are_compared_with_results():
    source = program(mutant("bias-scaled"), "F9")
    assert "got = np.asarray(y2)" in source
    want = next(line for line in source.splitlines() if line.startswith("want = "))
    assert "(y.astype(" in want and "np.array(" not in want


def test_arrays_that_are_written_to_between_calls_are_written_to_in_the_program():
    source = program(mutant("a-cached-by-id"), "C3", examples=300)
    assert "[...] = np." in source or "attempt(implementation" in source


def test_a_merge_with_a_state_and_one_without_are_both_taken():
    source = program(mutant("merge-delta-in-bf16"), "M1")
    assert "merged = merged if isinstance(merged, tuple) else (merged,)" in source


def test_threads_are_left_to_the_law():
    source = program(mutant("rows-in-the-object"), "C8", examples=300, shrink=False)
    assert "attempt(implementation, LAWS['C8'], problem)" in source


class Tires(Correct):
    """Wrong from the fortieth call on."""

    def __init__(self):
        self.calls = 0

    def forward(self, x, W, A, B, scale, bias=None):
        self.calls += 1
        return super().forward(x, W, A, B, scale * (1 + (self.calls > 39)), bias)


def test_where_the_problem_alone_is_not_enough_the_program_searches_again():
    source = program(Tires(), "F1", examples=60)
    assert "run_law(implementation, LAWS['F1'], examples=60, seed=0, shrink=False)" in source


class Raises(Correct):
    def forward(self, x, W, A, B, scale, bias=None):
        if scale == 2.0:
            raise ValueError("two")
        return super().forward(x, W, A, B, scale, bias)


class Wide(Correct):
    def forward(self, x, W, A, B, scale, bias=None):
        return super().forward(x, W, A, B, scale, bias).astype(np.float64)


def test_a_call_that_raises_and_a_result_of_the_wrong_form():
    assert "y = implementation.forward(x, W, A, B, 2.0" in program(Raises(), "F2", examples=60)
    assert "assert str(y.dtype) == 'float32'" in program(Wide(), "F2", examples=10)


def test_what_is_right_goes_by_the_precision():
    assert isinstance(right(Int8()), Int8) and type(right(Tires())) is Correct

    class Odd(Correct):
        precision = "int8"

    assert isinstance(right(Odd()), Int8)
