"""Console: progress in a log is never silent for long."""

from __future__ import annotations

import io
from typing import Any

import pytest

from pylora.display import console as module
from pylora.display.console import Console
from pylora.display.waiting import EVERY
from pylora.training.train import StepInfo


def info(step: int, steps: int) -> StepInfo:
    return StepInfo(step, steps, 0, 1.0, 1e-3, 1.0, 10, 10 * step, 5.0, 2.0 * step, None)


@pytest.mark.parametrize("pace", [0.5, 3.0])
def test_a_log_hears_of_training_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, pace: float
) -> None:
    clock = [100.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            return clock[0]

    monkeypatch.setattr(module, "time", Time)
    stream: Any = io.StringIO()
    heard = [clock[0]]
    with Console(stream).training() as on_step:
        for step in range(1, 201):
            clock[0] += pace
            before = stream.tell()
            on_step(info(step, 200))
            if stream.tell() > before:
                heard.append(clock[0])
    gaps = [b - a for a, b in zip(heard, heard[1:], strict=False)]
    assert max(gaps) <= EVERY + pace
    assert min(gaps) >= pace and len(heard) < 200
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step 1/200  loss 1.0000") and lines[-1].startswith("step 200/200")
    assert lines[-1].endswith(f"{199 * pace + pace:.0f} s")
