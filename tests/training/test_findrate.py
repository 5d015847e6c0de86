"""The rate finder: where it puts the rate, and that it leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.errors import ConfigError
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.findrate import find_rate, suggested
from pylora.training.train import train

MODEL = Llama.random(LlamaConfig.tiny(), seed=1)


def adapter() -> Adapter:
    config = LoraConfig(r=8, target_modules="all-linear")
    return Adapter.init(resolve(config, MODEL.config.modules()), config, seed=0)


def examples() -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.config.vocab_size, 9) for _ in range(8)]
    return [Example(ids[:-1], ids[1:]) for ids in rows]


def test_finds_a_rate_that_teaches_and_keeps_nothing() -> None:
    low = adapter()
    before = {p: (x.A.tobytes(), x.B.tobytes()) for p, x in low.items()}
    seen = []
    config = TrainConfig(batch_size=4)
    found = find_rate(
        MODEL, low, examples(), config, steps=40, on_step=lambda *one: seen.append(one)
    )
    assert {p: (x.A.tobytes(), x.B.tobytes()) for p, x in low.items()} == before
    assert [rate for _, rate, _ in seen] == list(found.rates) == sorted(found.rates)
    assert found.rates[0] == pytest.approx(1e-5) and found.relative[0] == pytest.approx(1)
    assert found.suggested is not None and found.suggested < found.least
    losses = {}
    for rate in (found.suggested, 1e-5):
        settings = TrainConfig(steps=20, learning_rate=rate, batch_size=4)
        losses[rate] = train(MODEL, adapter(), examples(), settings).losses[-1]
    assert losses[found.suggested] < 0.8 * losses[1e-5]


def test_is_the_same_each_time() -> None:
    first, again = (find_rate(MODEL, adapter(), examples(), steps=12) for _ in range(2))
    assert first.losses == again.losses and first.suggested == again.suggested


def test_a_curve_by_hand() -> None:
    rates = [1e-4, 1e-3, 1e-2, 1e-1]
    assert suggested(rates, [1.0, 0.9, 0.4, 2.0]) == (5e-3, 1e-2)
    assert suggested(rates, [1.0, 1.0, 1.0, 0.995])[0] is None  # it fell nowhere
    assert suggested(rates, [1.0, 1.1, 1.2, 1.3])[0] is None
    assert suggested([], [])[0] is None


def test_settings_that_show_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="rates from 1 to 0.1"):
        find_rate(MODEL, adapter(), examples(), low=1, high=0.1)
    with pytest.raises(ConfigError, match="5 steps shows nothing; 12 at least"):
        find_rate(MODEL, adapter(), examples(), steps=5)
