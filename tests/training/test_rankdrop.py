"""Rank dropout: what a step computes, and that nothing but the step and the seed decides it."""

from __future__ import annotations

import numpy as np
import pytest

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.model.linear import DropKey
from pylora.training.batching import epoch_steps
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.optimizer import gradients, trainable
from pylora.training.rankdrop import RankDropout, factors
from pylora.training.step import step_gradients
from pylora.training.train import train

MODEL = Llama.random(LlamaConfig.tiny(), seed=1)


def adapter(b: bool = False) -> Adapter:
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=not b)
    return Adapter.init(resolve(config, MODEL.config.modules()), config, seed=0)


def examples(n: int = 12) -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, MODEL.config.vocab_size, int(rng.integers(5, 14))) for _ in range(n)]
    return [Example(ids[:-1], ids[1:]) for ids in rows]


def test_each_rank_is_dropped_as_often_as_it_says() -> None:
    drawn = np.concatenate([factors(0.25, 64, "m", seed=5, step=s) for s in range(1, 100)])
    assert set(np.unique(drawn)) == {np.float32(0), np.float32(4 / 3)}
    assert abs((drawn == 0).mean() - 0.25) < 0.02
    assert (factors(0.25, 64, "m", seed=5, step=1) != factors(0.25, 64, "n", seed=5, step=1)).any()
    assert (factors(0.25, 64, "m", seed=5, step=1) == factors(0.25, 64, "m", seed=5, step=1)).all()


def test_the_gradient_is_that_of_the_adapter_without_the_ranks() -> None:
    """As if the module had fewer ranks, each of which counts more: written out in other arrays."""
    low, some = adapter(b=True), examples(4)
    step = (tuple(range(4)),)
    arrays = trainable(low)
    before = {name: a.copy() for name, a in arrays.items()}
    ranks = RankDropout(0.5, arrays, {}, seed=3, step=7, xp=np)
    MODEL.attach(low)
    with ranks.applied():
        loss, _, found = step_gradients(MODEL, some, step)
    grads = gradients(found, arrays)
    ranks.through(grads)
    assert all((arrays[name] == a).all() for name, a in before.items())  # bit for bit

    thin = adapter(b=True)
    for path, lora in thin.items():
        f = factors(0.5, 8, path, seed=3, step=7)
        lora.B[:, f == 0] = 0
        lora.A[f > 0] *= 2
    MODEL.attach(thin)
    want_loss, _, want = step_gradients(MODEL, some, step)
    assert loss == pytest.approx(want_loss, rel=1e-6)
    for path, lora in want.items():
        f = factors(0.5, 8, path, seed=3, step=7)
        assert np.allclose(grads[f"{path}.A"], lora.A * 2 * (f > 0)[:, None], rtol=1e-4, atol=1e-7)
        assert np.allclose(grads[f"{path}.B"][:, f > 0], lora.B[:, f > 0], rtol=1e-4, atol=1e-7)
        assert (grads[f"{path}.B"][:, f == 0] == 0).all()


def test_what_is_held_is_never_dropped() -> None:
    arrays = {"m.A": np.ones((8, 3), np.float32), "m.B": np.ones((3, 8), np.float32)}
    with RankDropout(0.9, arrays, {"m": 4}, seed=0, step=1, xp=np).applied():
        assert (arrays["m.A"][4:] == 1).all() and (arrays["m.A"][:4] == 0).any()


def test_the_arrays_come_back_from_a_step_that_failed() -> None:
    arrays = {"m.A": np.full((4, 3), 0.1, np.float32)}
    with pytest.raises(RuntimeError), RankDropout(0.5, arrays, {}, seed=0, step=1, xp=np).applied():
        raise RuntimeError
    assert (arrays["m.A"] == np.float32(0.1)).all()


def test_micro_batches_draw_what_the_whole_step_does() -> None:
    found = []
    for parts in (1, 3):
        low = adapter()
        config = TrainConfig(
            steps=4, learning_rate=1e-2, batch_size=6, accumulation=parts, rank_dropout=0.4,
            neftune_noise_alpha=5.0,
        )  # fmt: skip
        found.append(train(MODEL, low, examples(), config).losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    plain = TrainConfig(steps=4, learning_rate=1e-2, batch_size=6)
    assert train(MODEL, adapter(), examples(), plain).losses != pytest.approx(found[0], rel=1e-3)


def test_noise_is_a_matter_of_the_row_and_not_of_the_micro_batch() -> None:
    MODEL.attach(adapter())
    some = examples(6)
    lengths = [len(e) for e in some]
    losses = []
    for parts in (1, 2, 6):
        [step] = epoch_steps(lengths, seed=0, epoch=0, batch_size=6, accumulation=parts)
        key = DropKey(1, 2, noise=5.0)
        losses.append(step_gradients(MODEL, some, step, drop=key)[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
