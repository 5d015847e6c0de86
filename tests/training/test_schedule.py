"""The learning rate follows its documented formulas."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.errors import ConfigError
from pylora.training.schedule import ALIASES, SCHEDULES, decay_of, learning_rate, named


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
    st.sampled_from([s for s in SCHEDULES if s != "cosine_with_restarts"]),
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


def test_the_last_steps_decay() -> None:
    got = rates(10, peak=2.0, schedule="warmup_stable_decay", warmup_steps=2, decay_steps=4)
    quarter = math.sqrt(0.5)
    want = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1 + quarter, 1.0, 1 - quarter]
    assert got == pytest.approx(want, rel=1e-12)
    assert decay_of(100, 0, None) == 20 and decay_of(1, 1, None) == 1
    with pytest.raises(ConfigError, match="decay_steps is 9 and warmup_steps 2.*only 10 steps"):
        decay_of(10, 2, 9)


def test_restarts_come_back_to_the_peak() -> None:
    got = rates(9, peak=1.0, schedule="cosine_with_restarts", cycles=3)
    half = [1.0, 0.75, 0.25]  # cosine of three steps, of which the fourth would be 0
    assert got == pytest.approx(half * 3, rel=1e-12)
    one = rates(9, peak=1.0, schedule="cosine_with_restarts", cycles=1)
    assert one == rates(9, peak=1.0, schedule="cosine")
    assert rates(8, peak=1.0, schedule="cosine_with_restarts")[4] == 1.0  # two, where nobody said


def test_names_of_elsewhere() -> None:
    assert {named(n) for n in ALIASES} <= set(SCHEDULES)
    assert named("cosine-with-restarts") == "cosine_with_restarts" and named("odd") == "odd"


@pytest.mark.parity
@pytest.mark.parametrize("warmup", [1, 5])
def test_are_transformers_schedules(warmup: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.optimization")
    total, decay, cycles, peak = 24, 7, 3, 0.5

    def of(make: object, **settings: object) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
        [rule] = make(optimizer, num_warmup_steps=warmup, **settings).lr_lambdas  # type: ignore[operator]
        return [peak * rule(step) for step in range(1, total + 1)]

    whole = {"num_training_steps": total + 1}
    mine = {"peak": peak, "warmup_steps": warmup}
    wsd = of(theirs.get_wsd_schedule, num_decay_steps=decay, **whole)
    got = rates(total, schedule="warmup_stable_decay", decay_steps=decay, **mine)
    assert got == pytest.approx(wsd, rel=1e-12)
    restarts = of(
        theirs.get_cosine_with_hard_restarts_schedule_with_warmup, num_cycles=cycles, **whole
    )
    assert rates(total, schedule="cosine_with_restarts", cycles=cycles, **mine) == pytest.approx(
        restarts, rel=1e-9
    )
    assert rates(total, **mine) == pytest.approx(
        of(theirs.get_cosine_schedule_with_warmup, **whole), rel=1e-12
    )
    assert rates(total, schedule="linear", **mine) == pytest.approx(
        of(theirs.get_linear_schedule_with_warmup, **whole), rel=1e-12
    )
    low = of(theirs.get_wsd_schedule, num_decay_steps=decay, min_lr_ratio=0.1, **whole)
    mine |= {"floor": 0.1 * peak}
    got = rates(total, schedule="warmup_stable_decay", decay_steps=decay, **mine)
    assert got[warmup:] == pytest.approx(low[warmup:], rel=1e-12)  # theirs warms up from the floor
