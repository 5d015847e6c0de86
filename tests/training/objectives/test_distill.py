"""Distillation: slopes, the whole vocabulary as k, splits, and a student that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import counting, interrupt_after, problem

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.errors import ConfigError, DataError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.model.linear import DropKey
from pylora.model.llama import Llama
from pylora.reference import IGNORE
from pylora.training.examples import Example
from pylora.training.objectives.choose import choose
from pylora.training.objectives.distill import check_same_tokens, teach
from pylora.training.objectives.soft import divergence
from pylora.training.train import TrainConfig, train
from pylora.types import LoRA

VOCAB = LlamaConfig.tiny().vocab_size


def teacher(backend: Any = "c") -> Llama:
    return Llama.random(LlamaConfig.tiny(), 5, backend=backend)


@pytest.mark.parametrize("T, mix, k", [(1.0, 0.0, 4), (2.0, 0.3, 4), (1.5, 0.0, VOCAB)])
def test_gradients_are_the_slopes_of_the_loss(T: float, mix: float, k: int) -> None:
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    model = Llama.random(LlamaConfig.tiny(), 0, backend="numpy", dtype=np.float64)
    made = Adapter.init(resolve(config, model.config.modules()), config, seed=1)
    wide = {p: LoRA(v.A.astype(float), v.B.astype(float), v.scale) for p, v in made.items()}
    rng = np.random.default_rng(3)
    for lora in wide.values():
        lora.B[...] = rng.normal(size=lora.B.shape) / 4
    model.attach(wide)
    items = teach(teacher("numpy"), counting(4), top_k=k, temperature=T)
    objective, step = choose("distill", temperature=T, mix=mix), ((0, 1), (2, 3))
    loss, _, grads = objective.gradients(model, items, step, None, False)
    assert objective.evaluate(model, items, 3).nll == pytest.approx(loss, rel=1e-12)
    for path in wide:
        for field in "AB":
            array = getattr(wide[path], field)
            way = rng.normal(size=array.shape) * 1e-6
            array += way
            up = objective.gradients(model, items, step, None, False)[0]
            array -= 2 * way
            down = objective.gradients(model, items, step, None, False)[0]
            array += way
            want = float((getattr(grads[path], field) * way).sum())
            assert (up - down) / 2 == pytest.approx(want, rel=1e-5, abs=1e-14)


def test_all_tokens_are_the_whole_divergence() -> None:
    model, _ = problem("c")
    examples = counting(3)
    items = teach(teacher(), examples, top_k=VOCAB, temperature=1.0)
    got = choose("distill").evaluate(model, items, 2)
    want, n = 0.0, 0
    for e in examples:
        z, w = (m.forward(e.ids)[0].astype(float) for m in (model, teacher()))
        for row in np.flatnonzero(e.labels != IGNORE):
            q, p = (v[row] - np.log(np.exp(v[row]).sum()) for v in (z, w))
            want, n = want + float((np.exp(p) * (p - q)).sum()), n + 1
    assert got.metrics["kl"] == pytest.approx(want / n, rel=1e-5)
    few = teach(teacher(), examples, top_k=3, temperature=1.0)
    assert choose("distill").evaluate(model, few, 2).metrics["kl"] < got.metrics["kl"]


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    model, adapter = problem("c")
    model.attach(adapter)
    items = teach(model, counting(4), top_k=5, temperature=1.0)
    objective = choose("distill")
    evaluation = objective.evaluate(model, items, 4)
    assert evaluation.metrics["agreement"] == 1.0
    assert evaluation.metrics["kl"] == pytest.approx(0.0, abs=1e-6)
    _, _, grads = objective.gradients(model, items, ((0, 1, 2, 3),), None, False)
    assert max(np.abs(g.B).max() for g in grads.values()) < 1e-5


def test_tails_at_their_ends() -> None:
    sure = np.log(np.array([1.0, 1e-30]))
    kl, outer, inner = divergence(sure, sure)
    assert kl == pytest.approx(0.0, abs=1e-12) and np.isfinite(outer) and np.isfinite(inner).all()
    kl, outer, inner = divergence(sure, np.log(np.array([0.5, 0.25])))
    assert kl == pytest.approx(np.log(2), rel=1e-5) and outer == pytest.approx(1.0, rel=1e-5)


def test_a_step_is_the_same_however_it_is_cut(ops: Any) -> None:
    model, adapter = problem(ops, lora_dropout=0.2)
    for lora in adapter.values():
        lora.B[...] = 0.05
    model.attach(adapter)
    items, key = teach(teacher(), counting(5), top_k=6, temperature=2.0), DropKey(5, 3)
    objective = choose("distill", temperature=2, mix=0.2)
    loss, rows, grads = objective.gradients(model, items, ((4, 0, 2, 1, 3),), key, False)
    for step in (((4, 0), (2,), (1, 3)), ((4,), (0,), (2,), (1,), (3,))):
        got = objective.gradients(model, items, step, key, True)
        assert got[:2] == (loss, rows)
        for path, grad in got[2].items():
            for field in "AB":
                want = getattr(grads[path], field)
                assert np.abs(getattr(grad, field) - want).max() <= 1e-5 * np.abs(want).max()


def test_what_a_teacher_says_does_not_depend_on_its_batches() -> None:
    examples = counting(9)
    together = teach(teacher(), examples, top_k=4, temperature=1.0)
    for example, one in zip(examples, together):
        (alone,) = teach(teacher(), [example], top_k=4, temperature=1.0)
        assert alone.said.ids.tobytes() == one.said.ids.tobytes()
        assert alone.said.logp.tobytes() == one.said.logp.tobytes()
        assert (np.diff(one.said.logp, axis=1) <= 0).all()


def test_a_student_follows_and_a_resumed_run_has_the_bits(tmp_path: Path) -> None:
    config = TrainConfig(learning_rate=0.02, steps=25, batch_size=8, save_every=10)
    ends = []
    for interrupted in (False, True):
        model, adapter = problem("c", target_modules="all-linear", r=8)
        items = teach(teacher(), counting(8), top_k=8, temperature=1.0)
        before = choose("distill").evaluate(model, items, 8).metrics["kl"]
        rest: dict[str, Any] = {"eval_examples": items, "objective": choose("distill")}
        out = tmp_path / str(interrupted)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                train(model, adapter, items, config, out, on_step=interrupt_after(13), **rest)
            model, adapter = problem("c", target_modules="all-linear", r=8)
            result = train(model, adapter, items, config, out, resume=True, **rest)
        else:
            result = train(model, adapter, items, config, out, **rest)
        assert result.evaluation is not None
        assert result.evaluation.metrics["kl"] < before / 4
        ends.append((result.losses, adapter.digest()))
    assert ends[0] == ends[1]


def test_what_cannot_be_taught_is_named() -> None:
    model, adapter = problem("c", target_modules=["lm_head"], lora_dropout=0.5)
    examples = counting(2)
    for k in (0, VOCAB + 1, 1.5, True):
        with pytest.raises(ConfigError, match="top_k is .*; it must be a whole number from 1 to"):
            teach(model, examples, top_k=k, temperature=1.0)  # type: ignore[arg-type]
    items = teach(model, examples, top_k=2, temperature=1.0)
    with pytest.raises(UnsupportedError, match="dropout on the output layer"):
        train(model, adapter, items, TrainConfig(steps=1), objective=choose("distill"))
    with pytest.raises(DataError, match="examples that a teacher saw"):
        train(model, adapter, examples, objective=choose("distill"))
    other = [Example(e.ids + 1, e.labels, e.where) for e in examples]
    with pytest.raises(DataError, match="counting:0: the teacher's tokenizer makes other tokens"):
        check_same_tokens(examples, other)
