"""Defaults that teach: enough updates, however few records, and a rate by the model's width."""

from __future__ import annotations

from dataclasses import replace

import pytest
from training import counting, problem

from pylora.training import enough
from pylora.training.config import TrainConfig
from pylora.training.train import train


@pytest.mark.parametrize(
    ("records", "epochs", "steps"),
    [(1, 30, 30), (8, 30, 30), (60, 15, 120), (100, 10, 130), (960, 1, 120), (5000, 1, 625)],
)
def test_epochs_are_chosen_for_the_updates_that_they_make(
    records: int, epochs: int, steps: int
) -> None:
    lengths = [10] * records
    config = enough.settled(TrainConfig(), lengths, 576)
    assert (config.epochs, enough.total_steps(config, lengths)) == (epochs, steps)


def test_packed_batches_are_counted_as_they_are() -> None:
    lengths = [7, 9, 4, 6] * 5
    config = enough.settled(TrainConfig(packing=True, max_tokens=20), lengths, 576)
    assert config.epochs is not None and config.epochs < 30
    total = enough.total_steps(config, lengths)
    assert total >= enough.STEPS
    assert total == sum(enough.steps_of_an_epoch(lengths, config, e) for e in range(config.epochs))


def test_what_was_asked_for_is_left_alone() -> None:
    asked = TrainConfig(learning_rate=3e-5, epochs=1)
    assert enough.settled(asked, [5] * 60, 576) is asked
    steps = TrainConfig(learning_rate=3e-5, steps=4)
    assert enough.settled(steps, [5] * 60, 576).epochs is None


def test_the_rate_falls_with_the_width() -> None:
    assert enough.rate_for(768) == 1e-3 and enough.rate_for(64) == 2e-3
    assert 2e-4 <= enough.rate_for(4096) <= 3e-4
    rates = [enough.rate_for(width) for width in (512, 576, 1024, 2048, 4096, 8192)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 6


def test_a_run_that_is_too_short_is_said_to_be() -> None:
    assert (enough.undertrained(8) or "").startswith("8 steps: likely undertrained")
    assert (enough.undertrained(1) or "").startswith("1 step: likely")
    assert enough.undertrained(30) is enough.undertrained(1000) is None


def test_a_run_with_nothing_said_is_the_run_with_what_was_chosen() -> None:
    ends = []
    for config in (TrainConfig(), TrainConfig(learning_rate=2e-3, epochs=30)):
        model, adapter = problem("numpy")
        result = train(model, adapter, counting(4), replace(config, batch_size=4))
        ends.append((result.losses, adapter.digest()))
    assert ends[0] == ends[1] and len(ends[0][0]) == 30
