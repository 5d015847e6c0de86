"""The objectives of whole answers: gradients against finite differences, any split of a step, runs
that are interrupted, and that they teach."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preferences import preferences, verdicts
from training import interrupt_after, problem

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import DataError
from pylora.model.config import LlamaConfig
from pylora.model.linear import DropKey
from pylora.model.llama import Llama
from pylora.training.checkpoint import checkpoints
from pylora.training.objectives.choose import choose
from pylora.training.objectives.likelihood import log_sigmoid, preferred, sigmoid
from pylora.training.train import TrainConfig, train
from pylora.types import LoRA

NAMES = ("dpo", "ipo", "simpo", "orpo", "kto")
SETTINGS: dict[str, dict[str, float]] = {
    "dpo": {"label_smoothing": 0.1, "beta": 0.4},
    "ipo": {"beta": 0.3},
    "simpo": {"label_smoothing": 0.1, "gamma": 0.3},
    "orpo": {"beta": 0.7},
    "kto": {"desirable_weight": 1.5, "beta": 0.8},
}
TARGETS = ["q_proj", "down_proj", "lm_head"]


def items_of(name: str, n: int = 6, seed: int = 0) -> Any:
    return verdicts(n, seed) if name == "kto" else preferences(n, seed)


def random_B(adapter: Any, seed: int = 3) -> Any:
    rng = np.random.default_rng(seed)
    for lora in adapter.values():
        lora.B[...] = rng.normal(size=lora.B.shape) / 4
    return adapter


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_slopes_of_the_loss(name: str) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    model = Llama.random(LlamaConfig.tiny(), 0, backend="numpy", dtype=np.float64)
    made = Adapter.init(resolve(config, model.config.modules()), config, seed=1)
    wide = {p: LoRA(v.A.astype(float), v.B.astype(float), v.scale) for p, v in made.items()}
    model.attach(random_B(wide))
    objective: Any = choose(name, **SETTINGS[name])
    items, step = items_of(name), ((0, 1, 2), (3, 4, 5))
    objective.prepare(model, items, None)
    shared = objective.of_step(model, items)
    objective.of_step = lambda model, items: shared  # KTO's z has no gradient
    _, _, grads = objective.gradients(model, items, step, None, False)
    rng = np.random.default_rng(7)
    for path in (list(wide)[0], list(wide)[-1]):
        for field in "AB":
            array = getattr(wide[path], field)
            way = rng.normal(size=array.shape) * 1e-6
            array += way
            up = objective.gradients(model, items, step, None, False)[0]
            array -= 2 * way
            down = objective.gradients(model, items, step, None, False)[0]
            array += way
            want = float((getattr(grads[path], field) * way).sum())
            assert want != 0
            assert (up - down) / 2 == pytest.approx(want, rel=1e-5, abs=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_same_however_it_is_cut(name: str, ops: Any) -> None:
    model, adapter = problem(ops, target_modules=TARGETS, lora_dropout=0.2)
    model.attach(random_B(adapter))
    objective = choose(name, **SETTINGS[name])
    items, key = items_of(name, 5), DropKey(seed=5, step=3)
    objective.prepare(model, items, None)
    whole = objective.gradients(model, items, ((4, 0, 2, 1, 3),), key, False)
    for step in (((4, 0), (2,), (1, 3)), ((4,), (0,), (2,), (1,), (3,))):
        loss, rows, grads = objective.gradients(model, items, step, key, True)
        assert loss == whole[0] and rows == whole[1]
        for path, grad in grads.items():
            for field in "AB":
                want = getattr(whole[2][path], field)
                got = getattr(grad, field)
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (path, field)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_the_bits_of_a_whole_one(name: str, tmp_path: Path) -> None:
    config = TrainConfig(learning_rate=0.01, steps=5, batch_size=4, accumulation=2, save_every=2)
    ends = []
    for interrupted in (False, True):
        model, adapter = problem("c", lora_dropout=0.1)
        out = tmp_path / str(interrupted)
        objective = choose(name, **SETTINGS[name])
        items, held = items_of(name, 8), items_of(name, 4, seed=9)
        rest: dict[str, Any] = {"eval_examples": held, "objective": objective}
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(model, adapter, items, config, out, on_step=interrupt_after(3), **rest)
            model, adapter = problem("c", lora_dropout=0.1)
            rest["objective"] = choose(name, **SETTINGS[name])
            result = train(model, adapter, items, config, out, resume=True, **rest)
        else:
            result = train(model, adapter, items, config, out, **rest)
        assert result.evaluation is not None
        ends.append((result.losses, adapter.digest(), result.evaluation.metrics))
        assert len(checkpoints(out)) == 2
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", NAMES)
def test_another_setting_is_another_run(name: str, tmp_path: Path) -> None:
    config = TrainConfig(steps=1, batch_size=2)
    items = items_of(name, 2)
    model, adapter = problem("c")
    train(model, adapter, items, config, tmp_path, objective=choose(name))
    with pytest.raises(Exception, match="beta was .* and is 0.3"):
        train(model, adapter, items, replace(config), tmp_path, resume=True,
              objective=choose(name, beta=0.3))  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_teaches(name: str) -> None:
    model, adapter = problem("c", target_modules="all-linear")
    items = items_of(name, 8)
    config = TrainConfig(learning_rate=0.02, steps=30, batch_size=8)
    objective = choose(name)
    before = objective.evaluate if name in ("simpo", "orpo") else None
    model.attach(adapter)
    start = before(model, items, 4).metrics["accuracy"] if before else 0.5
    result = train(model, adapter, items, config, eval_examples=items, objective=objective)
    assert result.evaluation is not None
    metrics = result.evaluation.metrics
    assert metrics["accuracy"] == 1.0 and start < 1.0 and metrics["margin"] > 0.05
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_fresh_adapter_is_its_own_reference(name: str, ops: Any) -> None:
    model, adapter = problem(ops)
    model.attach(adapter)
    items, objective = items_of(name), choose(name)
    objective.prepare(model, items, None)
    assert model.adapter is adapter
    got = objective.evaluate(model, items, 2)
    assert got.nll == pytest.approx(math.log(2) if name == "dpo" else 0.5, abs=1e-15)
    assert got.metrics["margin"] == 0.0


def test_an_evaluation_does_not_depend_on_its_batches() -> None:
    for name in NAMES:
        model, adapter = problem("c")
        model.attach(random_B(adapter))
        objective, items = choose(name), items_of(name, 7)
        objective.prepare(model, items, None)
        results = [objective.evaluate(model, items, size) for size in (1, 3, 7)]
        assert len({(r.nll, *r.metrics.values()) for r in results}) == 1
        assert "accuracy" in results[0].words()


def test_the_logistic_loss_at_its_ends() -> None:
    assert sigmoid(800.0) == 1.0 and sigmoid(-800.0) == 0.0 and sigmoid(0.0) == 0.5
    assert log_sigmoid(-800.0) == -800.0 and log_sigmoid(800.0) == 0.0
    assert preferred(-800.0, 0.0) == (800.0, -1.0)
    assert preferred(0.0, 0.3)[0] == pytest.approx(math.log(2))


def test_items_of_another_kind_are_refused() -> None:
    model, adapter = problem("c")
    with pytest.raises(DataError, match="objective kto needs Verdict records"):
        train(model, adapter, preferences(2), objective=choose("kto"))
    with pytest.raises(DataError, match="objective dpo needs Preference records"):
        train(model, adapter, verdicts(2), objective=choose("dpo"))
    with pytest.raises(DataError, match="there are no training records"):
        train(model, adapter, [], objective=choose("dpo"))
    with pytest.raises(DataError, match="made:0: .* tokens in all, more than max_tokens 4"):
        train(model, adapter, preferences(2), TrainConfig(max_tokens=4), objective=choose("dpo"))
