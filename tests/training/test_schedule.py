"""The learning rate follows its documented formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.errors import ConfigError
from pylora.training.schedule import SCHEDULES, learning_rate


def rates(total: int, **settings: object) -> list[float]:
    return [learning_rate(i, total, **settings) for i in range(1, total + 1)]  # type: ignore[arg-type]


def test_cosine_values_by_hand() -> None:
    got = rates(5, peak=8.0, warmup_steps=2, floor=2.0)
    quarter = math.sqrt(0.5)  # cos(pi / 4)
    assert got == pytest.approx([4.0, 8.0, 5 + 3 * quarter, 5.0, 5 - 3 * quarter], rel=1e-15)


def test_linear_and_constant_by_hand() -> None:
    assert rates(4, peak=4.0, schedule="linear") == [4.0, 3.0, 2.0, 1.0]
    assert rates(3, peak=4.0, schedule="constant", warmup_steps=2) == [2.0, 4.0, 4.0]


@given(
    st.sampled_from(SCHEDULES),
    st.integers(1, 40),
    st.integers(0, 60),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
)
def test_rises_then_falls_between_floor_and_peak(
    schedule: str, total: int, warmup: int, peak: float, part: float
) -> None:
    got = rates(total, peak=peak, schedule=schedule, warmup_steps=warmup, floor=part * peak)
    top = min(max(warmup, 1), total)
    assert got[:top] == sorted(got[:top])
    assert got[top - 1 :] == sorted(got[top - 1 :], reverse=True)
    assert all(0 < rate <= peak for rate in got)
    assert all(rate >= part * peak * (1 - 1e-12) for rate in got[top:])


@pytest.mark.parametrize("step", [0, 6, -1])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ConfigError, match="outside the run"):
        learning_rate(step, 5, peak=1.0)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="'cosin'.*cosine, linear, constant"):
        learning_rate(2, 5, peak=1.0, schedule="cosin")
