"""Classes and numbers of texts: slopes, splits, resumed runs, and what the metrics mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import interrupt_after, problem

from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, DataError, FileFormatError, PlanError
from pylora.model.config import LlamaConfig
from pylora.model.linear import DropKey
from pylora.model.llama import Llama
from pylora.training.objectives.choose import choose
from pylora.training.objectives.headed import CLASSES, HeadedAdapter
from pylora.training.objectives.labelled import Labelled
from pylora.training.train import TrainConfig, train

VOCAB = LlamaConfig.tiny().vocab_size
NAMES = ("no", "yes", "perhaps")


def headed(ops: Any, classes: Any = NAMES, **lora: Any) -> tuple[Llama, HeadedAdapter]:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(**{**settings, **lora})
    model = Llama.random(LlamaConfig.tiny(), seed=0, backend=ops)
    plan = resolve(config, model.config.modules())
    return model, HeadedAdapter.fresh(plan, config, 1, model.config.hidden_size, classes)


def texts(n: int = 9) -> list[Labelled]:
    """What a text begins with is its class."""
    out = []
    for i in range(n):
        ids = [i % 3 + 1, *((11 * i + 7 * t) % VOCAB for t in range(2 + i % 4))]
        out.append(Labelled(np.array(ids), float(i % 3), f"made:{i}"))
    return out


@pytest.mark.parametrize("name", ["classify", "regress"])
def test_gradients_are_the_slopes_of_the_loss(name: str) -> None:
    model, adapter = headed("numpy", NAMES if name == "classify" else ())
    rng = np.random.default_rng(3)
    for lora in adapter.values():
        lora.B[...] = rng.normal(size=lora.B.shape) / 4
    adapter.score[...] = rng.normal(size=adapter.score.shape) / 4
    model.attach(adapter)
    objective, items = choose(name), texts(6)
    step = ((0, 1, 2), (3, 4, 5))
    _, _, grads = objective.gradients(model, items, step, None, False)
    path = list(adapter)[0]
    for array, grad in (
        (adapter.score, grads["score"].weight),  # type: ignore[attr-defined]
        (adapter[path].A, grads[path].A),
        (adapter[path].B, grads[path].B),
    ):
        way = rng.normal(size=array.shape).astype(np.float32) * 2e-3
        kept = array.copy()
        array[...] = kept + way
        up = objective.gradients(model, items, step, None, False)[0]
        array[...] = kept - way
        down = objective.gradients(model, items, step, None, False)[0]
        array[...] = kept
        want = float((grad.astype(float) * way).sum())
        assert (up - down) / 2 == pytest.approx(want, rel=2e-2, abs=1e-6)
        assert abs(want) > 1e-5


def test_a_step_is_the_same_however_it_is_cut(ops: Any) -> None:
    model, adapter = headed(ops, lora_dropout=0.2)
    model.attach(adapter)
    objective, items, key = choose("classify"), texts(5), DropKey(seed=5, step=3)
    for lora in adapter.values():
        lora.B[...] = 0.1
    loss, rows, grads = objective.gradients(model, items, ((4, 0, 2, 1, 3),), key, False)
    for step in (((4, 0), (2,), (1, 3)), ((4,), (0,), (2,), (1,), (3,))):
        got = objective.gradients(model, items, step, key, True)
        assert got[:2] == (loss, rows)
        for path, grad in got[2].items():
            for field in ("weight",) if path == "score" else ("A", "B"):
                want = getattr(grads[path], field)
                assert np.abs(getattr(grad, field) - want).max() <= 1e-5 * np.abs(want).max()


def test_it_learns_and_a_resumed_run_has_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    config = TrainConfig(learning_rate=0.02, steps=30, batch_size=9, save_every=10)
    ends = []
    for interrupted in (False, True):
        model, adapter = headed("c", lora_dropout=0.1)
        out = tmp_path / str(interrupted)
        rest: dict[str, Any] = {"eval_examples": texts(), "objective": choose("classify")}
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(model, adapter, texts(), config, out, on_step=interrupt_after(17), **rest)
            model, adapter = headed("c", lora_dropout=0.1)
            result = train(model, adapter, texts(), config, out, resume=True, **rest)
        else:
            result = train(model, adapter, texts(), config, out, **rest)
        assert result.evaluation is not None
        assert result.evaluation.metrics == {"accuracy": 1.0, "macro_f1": 1.0}
        ends.append((result.losses, adapter.digest()))
    assert ends[0] == ends[1]
    saved = HeadedAdapter.load(tmp_path / "True" / "adapter", model.config)
    assert saved.digest() == adapter.digest() and saved.classes == NAMES
    model.attach(saved)
    found = saved.predict(model, [t.ids for t in texts()]).argmax(axis=1)
    assert found.tolist() == [int(t.label) for t in texts()]


def test_a_number_is_learnt() -> None:
    model, adapter = headed("c", ())
    config = TrainConfig(learning_rate=0.02, steps=60, batch_size=9)
    result = train(
        model, adapter, texts(), config, eval_examples=texts(), objective=choose("regress")
    )
    assert result.evaluation is not None and result.evaluation.metrics["r2"] > 0.9
    assert result.evaluation.nll == pytest.approx(result.evaluation.metrics["rmse"] ** 2)


def test_the_metrics() -> None:
    classify: Any = choose("classify")
    scores = np.array([[2.0, 1, 0], [2, 1, 0], [0, 3, 0], [0, 3, 0]])
    found = classify.metrics([0, 1, 1, 2], scores)
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)
    regress: Any = choose("regress")
    assert regress.metrics([1.0, 3.0], np.array([[1.0], [3.0]])) == {"rmse": 0.0, "r2": 1.0}
    assert regress.metrics([2.0], np.array([[1.0]])) == {"rmse": 1.0}
    loss, slope = classify.of(texts(1)[0], np.array([1000.0, 0.0, -1000.0]))
    assert loss == 0.0 and slope.tolist() == [0.0, 0.0, 0.0]
    assert classify.of(texts(1)[0], np.zeros(3))[0] == pytest.approx(math.log(3))


def test_bad_heads_and_labels_are_named(tmp_path: Path) -> None:
    model, adapter = headed("c", ("a", "b"))
    with pytest.raises(DataError, match="made:2: the label 2 is out of range: the head has 2"):
        train(model, adapter, texts(), TrainConfig(steps=1), objective=choose("classify"))
    plain_model, plain = problem("c")
    with pytest.raises(ConfigError, match="trains an adapter with a head"):
        train(plain_model, plain, texts(), objective=choose("classify"))
    with pytest.raises(DataError, match="needs texts with labels"):
        train(model, adapter, [1, 2], objective=choose("classify"))
    plain.save(tmp_path / "plain")
    with pytest.raises(FileFormatError, match="an adapter without a head"):
        HeadedAdapter.load(tmp_path / "plain", model.config)
    adapter.save(tmp_path / "made")
    (tmp_path / "made" / CLASSES).write_text('["a"]')
    with pytest.raises(PlanError, match="score.weight has shape"):
        HeadedAdapter.load(tmp_path / "made", model.config)
    (tmp_path / "made" / CLASSES).write_text("{")
    with pytest.raises(FileFormatError, match="classes.json: not JSON"):
        HeadedAdapter.load(tmp_path / "made", model.config)
