"""Training: it learns, accumulation is the full batch, and bad numbers stop it with a sentence."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bounds
import numpy as np
import pytest
from training import bits, counting, problem

from pylora import backends
from pylora.errors import ConfigError, DataError, DtypeError, PlanError, TrainingError
from pylora.model.linear import DropKey
from pylora.ops.plain import Plain
from pylora.training import log
from pylora.training.batching import assemble, epoch_steps
from pylora.training.checkpoint import checkpoints, fingerprint
from pylora.training.evaluate import evaluate
from pylora.training.optimizer import Optimizer, gradients, trainable
from pylora.training.schedule import learning_rate
from pylora.training.step import step_gradients
from pylora.training.train import StepInfo, TrainConfig, train
from pylora.types import AdamW, LoRA

FAST = TrainConfig(learning_rate=0.02, steps=4, batch_size=4)


def test_the_loss_of_a_learnable_rule_goes_down(ops: Any) -> None:
    model, adapter = problem(ops, target_modules="all-linear")
    base = fingerprint(model)
    config = replace(FAST, steps=60, batch_size=12, warmup_steps=3)
    result = train(model, adapter, counting(), config, eval_examples=counting())
    assert len(result.losses) == result.steps == 60
    assert result.losses[-1] < result.losses[0] / 4
    assert result.evaluation is not None and result.evaluation.nll < result.losses[0] / 4
    assert fingerprint(model) == base, "the base model's weights were written to"
    assert result.adapter is adapter and model.adapter is adapter


class Spy:
    """Notes, by module, the dropout masks of the forward pass and bounds of dA and dB."""

    def __init__(self, ops: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.masks: dict[str, list[np.ndarray]] = {}
        self.bounds: dict[str, Any] = {}
        self.paths = {id(lora): path for path, lora in adapter.items()}
        self.forward, self.backward, self.dropout = (
            ops.linear_forward,
            ops.linear_backward,
            ops.dropout,
        )
        monkeypatch.setattr(ops, "linear_forward", self.on_forward)
        for op in ("qkv_forward", "gate_up_forward"):  # through it, too
            monkeypatch.setattr(ops, op, partial(getattr(Plain, op), ops))
        monkeypatch.setattr(ops, "linear_backward", self.on_backward)

    def on_forward(self, x: Any, projections: Any) -> Any:
        for p in projections:
            if p.drop is not None:
                mask = self.dropout(np.ones(x.shape, np.float32), p.drop)
                self.masks.setdefault(self.paths[id(p.lora)], []).append(mask)
        return self.forward(x, projections)

    def on_backward(self, x: Any, projections: Any, **rest: Any) -> Any:
        for p in projections:
            if p.lora is not None:
                rate = p.drop.p if p.drop else 0.0
                zero = np.zeros((p.dy.shape[1], x.shape[1]))
                _, A, B = bounds.lora_backward(p.dy, x, p.h, zero, p.lora, p=rate)
                before = self.bounds.get(self.paths[id(p.lora)], (0, 0))
                self.bounds[self.paths[id(p.lora)]] = (before[0] + A, before[1] + B)
        return self.backward(x, projections, **rest)


@pytest.mark.parametrize("target", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_accumulation_is_the_full_batch(
    ops: Any, rng: Any, monkeypatch: pytest.MonkeyPatch, target: list[str]
) -> None:
    model, adapter = problem(ops, target_modules=target, lora_dropout=0.3)
    for lora in adapter.values():
        lora.B[...] = rng.normal(size=lora.B.shape) / 4
    model.attach(adapter)
    examples = counting(7)
    key = DropKey(seed=5, step=3)
    runs = []
    for step in (((3, 0, 6, 2, 1, 5, 4),), ((3, 0), (6,), (2, 1, 5, 4))):
        with monkeypatch.context() as patch:
            spy = Spy(ops, adapter, patch)
            runs.append((*step_gradients(model, examples, step, drop=key), spy))
    (loss, rows, grads, spy), (loss2, rows2, grads2, spy2) = runs
    assert loss == loss2 and rows == rows2 == sum(len(e) for e in examples)
    assert set(spy.masks) == set(spy2.masks) == set(adapter)
    for path in adapter:
        masks, masks2 = (np.concatenate(s.masks[path]) for s in (spy, spy2))
        assert masks.tobytes() == masks2.tobytes(), path
        assert 0 < (masks == 0).mean() < 1
        # The sums have the same terms, bit for bit, in another order: both are within the bound.
        for name, bound in zip(("A", "B"), spy.bounds[path]):
            got, want = getattr(grads2[path], name), getattr(grads[path], name)
            assert np.abs(want).max() > 0
            bounds.assert_within(got, want, 2 * bound, f"{path}.{name}")


def test_the_first_loss_does_not_depend_on_the_split(ops: Any) -> None:
    losses = []
    for accumulation in (1, 3, 12):
        model, adapter = problem(ops, lora_dropout=0.2)
        config = replace(FAST, steps=1, batch_size=12, accumulation=accumulation)
        losses.append(train(model, adapter, counting(), config).losses)
    assert losses[0] == losses[1] == losses[2]


def test_gradient_checkpointing_gives_the_same_bits(ops: Any) -> None:
    ends = []
    for recompute in (False, True):
        model, adapter = problem(ops, lora_dropout=0.2)
        result = train(model, adapter, counting(), replace(FAST, recompute=recompute))
        ends.append((result.losses, adapter.digest()))
    assert ends[0] == ends[1]


def test_threads_change_no_bit() -> None:
    try:
        ops: Any = backends.get("c")
    except backends.BackendError as error:
        pytest.skip(str(error))
    before, ends = ops.num_threads, []
    try:
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            model, adapter = problem(ops, target_modules="all-linear", lora_dropout=0.1)
            result = train(model, adapter, counting(24), replace(FAST, batch_size=24))
            ends.append((result.losses, adapter.digest()))
    finally:
        ops.set_num_threads(before)
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_trains_on_every_example_once(ops: Any, packing: bool) -> None:
    model, adapter = problem(ops)
    config = TrainConfig(epochs=2, batch_size=5, packing=packing, max_tokens=20, learning_rate=0.02)
    result = train(model, adapter, counting(), config)
    assert result.tokens == 2 * sum(len(e) for e in counting())


# ---- the optimizer ------------------------------------------------------------------------------


def test_an_update_by_hand(ops: Any, rng: Any) -> None:
    A, B = (rng.normal(size=s).astype(np.float32) for s in ((2, 5), (4, 2)))
    bias = rng.normal(size=4).astype(np.float32)
    adapter = {"m": LoRA(A, B, 1.0, bias=bias)}
    before = {name: p.copy() for name, p in trainable(adapter).items()}
    assert list(before) == ["m.A", "m.B", "m.bias"]
    grads = {n: rng.normal(size=p.shape).astype(np.float32) for n, p in before.items()}
    config = TrainConfig(lora_plus_ratio=16.0, weight_decay=0.1, max_grad_norm=0.5)
    optimizer = Optimizer(ops, trainable(adapter), config)
    norm = optimizer.norm(grads)
    exact = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert norm == pytest.approx(exact, rel=1e-14) and norm > 0.5
    optimizer.update(grads, norm, 1, 0.01)
    for name, lr, decay in (("m.A", 0.01, 0.1), ("m.B", 0.16, 0.1), ("m.bias", 0.01, 0.0)):
        p, zero = before[name].astype(np.float64), np.zeros(before[name].shape)
        g = grads[name] * (0.5 / norm)
        want = p * (1 - lr * decay) - lr * g / (np.abs(g) + config.eps)
        o = AdamW(lr=lr, step=1, weight_decay=decay, grad_scale=0.5 / norm)
        bound, _, _ = bounds.adamw_step(p, grads[name], zero, zero, o)
        bounds.assert_within(optimizer.parameters[name], want, bound, name)


def test_a_small_gradient_is_not_clipped(ops: Any) -> None:
    adapter = {"m": LoRA(np.ones((1, 2), np.float32), np.ones((2, 1), np.float32), 1.0)}
    ends = []
    for limit in (None, 10.0):
        for p in (parameters := trainable(adapter)).values():
            p[...] = 1
        grads = {n: np.full(p.shape, 0.1, np.float32) for n, p in parameters.items()}
        optimizer = Optimizer(ops, parameters, TrainConfig(max_grad_norm=limit))
        optimizer.update(grads, optimizer.norm(grads), 1, 0.1)
        ends.append(bits(optimizer.state()) | bits(parameters))
    assert ends[0] == ends[1]


def test_arrays_that_cannot_be_trained_are_named() -> None:
    A, B = np.zeros((2, 3), np.float32), np.zeros((4, 2), np.float32)
    with pytest.raises(DtypeError, match="m.B is trained in place.* float64"):
        trainable({"m": LoRA(A, B.astype(np.float64), 1.0)})
    with pytest.raises(DtypeError, match="m.A is trained in place"):
        trainable({"m": LoRA(np.zeros((3, 2), np.float32).T, B, 1.0)})
    with pytest.raises(PlanError, match="nothing to train"):
        trainable({})
    with pytest.raises(PlanError, match="no gradient for m.A"):
        gradients({}, {"m.A": A})


# ---- what a run reports -------------------------------------------------------------------------


def test_steps_are_reported_and_logged(ops: Any, tmp_path: Path) -> None:
    model, adapter = problem(ops)
    config = replace(FAST, steps=5, eval_every=2, save_every=2, keep=1, warmup_steps=2)
    seen: list[StepInfo] = []
    result = train(model, adapter, counting(), config, tmp_path, counting(4, 50), seen.append)
    assert [i.step for i in seen] == [1, 2, 3, 4, 5] and {i.steps for i in seen} == {5}
    assert [i.epoch for i in seen] == [0, 0, 0, 1, 1]  # 12 examples are 3 steps of 4
    assert [i.loss for i in seen] == result.losses
    assert [i.learning_rate for i in seen] == [
        learning_rate(n, 5, peak=0.02, warmup_steps=2) for n in range(1, 6)
    ]
    assert seen[-1].tokens_seen == sum(i.tokens for i in seen) == result.tokens
    assert [i.step for i in seen if i.evaluation is not None] == [2, 4, 5]
    assert seen[-1].evaluation == result.evaluation
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in steps] == [
        (i.step, i.loss, i.grad_norm) for i in seen
    ]
    assert {"learning_rate", "tokens", "tokens_per_second", "seconds"} <= set(steps[0])
    assert steps[-1]["eta_seconds"] == 0 < steps[0]["eta_seconds"]
    assert steps[0]["memory_bytes"] is None or steps[0]["memory_bytes"] > 1e6
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 2, 4, 5]
    assert [step for step, _ in result.evaluations] == [0, 2, 4, 5]
    assert evaluations[-1]["eval_perplexity"] == math.exp(evaluations[-1]["eval_loss"])
    read = log.evaluations(tmp_path / "log.jsonl")
    assert read == [(line["step"], line["eval_loss"]) for line in evaluations]
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 9, "eval_lo')  # a process that was killed
    assert log.evaluations(tmp_path / "log.jsonl") == read
    assert log.evaluations(tmp_path / "none.jsonl") == []
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000005"]
    again = type(adapter).load(tmp_path / "adapter", model.config.modules())
    assert again.digest() == adapter.digest()


def test_evaluation_is_the_mean_over_tokens(ops: Any) -> None:
    model, adapter = problem(ops)
    examples = counting(5)
    got = evaluate(model, examples, batch_size=2)
    parts = [model.loss(e.ids, e.labels, grads=False)[0] for e in examples]
    count = sum(e.label_count for e in examples)
    assert got.nll == math.fsum(np.concatenate(parts).tolist()) / count
    assert (got.tokens, got.perplexity) == (count, math.exp(got.nll))
    assert evaluate(model, examples, batch_size=5).nll == got.nll
    with pytest.raises(DataError, match="no examples"):
        evaluate(model, [])


def test_the_loss_is_that_of_the_model(ops: Any) -> None:
    model, adapter = problem(ops)
    examples = counting(6)
    result = train(model, adapter, examples, replace(FAST, steps=1, batch_size=6))
    model.detach()
    batch = assemble(examples, tuple(range(6)))
    nll, _ = model.loss(batch.ids, batch.labels, batch.seqs, grads=False)
    assert result.losses[0] == math.fsum(nll.tolist()) / sum(e.label_count for e in examples)


# ---- ends that are not the last step ------------------------------------------------------------


@pytest.mark.parametrize("poison", ["weights", "gradient"])
def test_numbers_that_are_not_finite_stop_the_run(
    ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison: str
) -> None:
    model, adapter = problem(ops)
    good: dict[str, bytes] = {}

    def on_step(info: StepInfo) -> None:
        if info.step == 3:
            good.update(bits(trainable(adapter)))
            if poison == "weights":
                norm = model.head.norm
                model.head.norm = replace(norm, w=np.full_like(norm.w, np.nan))
            else:
                monkeypatch.setattr(ops, "sum_squares", lambda x: math.inf)

    config = replace(FAST, save_every=2, steps=6)
    with pytest.raises(TrainingError, match="diverged at step 4: .*checkpoint-000002"):
        train(model, adapter, counting(), config, tmp_path, on_step=on_step)
    assert bits(trainable(adapter)) == good, "the adapter was updated by numbers that are no good"
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002"]
    with pytest.raises(TrainingError, match="before this step. Nothing was updated yet"):
        train(model, adapter, counting(), config)


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(ops: Any, tmp_path: Path) -> None:
    model, adapter = problem(ops)
    before = signal.getsignal(signal.SIGINT)

    def on_step(info: StepInfo) -> None:
        if info.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, adapter, counting(), FAST, tmp_path, on_step=on_step)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002"]
    stored = type(adapter).load(tmp_path / "checkpoint-000002", model.config.modules())
    assert stored.digest() == adapter.digest()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="there is no SIGTERM")
def test_sigterm_saves_in_a_program_that_leaves_it_alone(ops: Any, tmp_path: Path) -> None:
    """By default it would end the process; after the checkpoint it does, with the same code."""
    model, adapter = problem(ops)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def on_step(info: StepInfo) -> None:
        if info.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        train(model, adapter, counting(), FAST, tmp_path, on_step=on_step)
    assert ended.value.code == 128 + signal.SIGTERM
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(ops: Any, tmp_path: Path, number: int) -> None:
    model, adapter = problem(ops)
    after: list[int] = []

    def on_step(info: StepInfo) -> None:
        if info.step == 2:
            signal.raise_signal(number)
            signal.raise_signal(number)
            after.append(1)

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(model, adapter, counting(), FAST, tmp_path, on_step=on_step)
    assert not after, "the second one did not end what was under way"


def test_a_directory_with_a_run_in_it_is_not_overwritten_by_accident(
    ops: Any, tmp_path: Path
) -> None:
    model, adapter = problem(ops)
    train(model, adapter, counting(), FAST, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds a training run"):
        train(model, adapter, counting(), FAST, tmp_path)
    train(model, adapter, counting(), replace(FAST, steps=2), tmp_path, overwrite=True)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000002"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    model, adapter = problem("numpy")
    before = adapter.digest()
    with pytest.raises(ConfigError, match=r"a dict can be trained without out_dir"):
        train(model, dict(adapter), counting(), FAST, tmp_path / "run")
    assert adapter.digest() == before and not (tmp_path / "run").exists()


def test_without_a_directory_nothing_is_written(
    ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, adapter = problem(ops)
    train(model, adapter, counting(), replace(FAST, save_every=1, steps=2))
    assert list(tmp_path.iterdir()) == []


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", -1e-4, "learning_rate is -0.0001; it must be finite and above 0"),
        ("learning_rate", 0, "above 0"),
        ("learning_rate", math.nan, "learning_rate is nan"),
        ("learning_rate", "1e-4", "learning_rate is '1e-4'; it must be a number"),
        ("steps", 0, "steps is 0; it must be at least 1"),
        ("steps", 2.5, "steps is 2.5; it must be a whole number"),
        ("epochs", 0, "epochs is 0"),
        ("batch_size", 0, "batch_size is 0"),
        ("batch_size", True, "batch_size is True"),
        ("accumulation", -1, "accumulation is -1"),
        ("max_tokens", 0, "max_tokens is 0"),
        ("packing", True, "packing needs max_tokens"),
        ("packing", 1, "packing is 1; it must be True or False"),
        ("schedule", "cosin", "schedule is 'cosin'; it must be one of cosine"),
        ("warmup_steps", -1, "warmup_steps is -1"),
        ("floor", 1.5, "floor is 1.5; it must be finite and at least 0 and at most 1"),
        ("weight_decay", -0.1, "weight_decay is -0.1"),
        ("beta1", 1.0, "beta1 is 1; it must be finite and at least 0 and below 1"),
        ("beta2", -0.5, "beta2"),
        ("eps", 0.0, "eps is 0"),
        ("max_grad_norm", 0.0, "max_grad_norm is 0"),
        ("lora_plus_ratio", math.inf, "lora_plus_ratio is inf"),
        ("seed", -1, "seed is -1"),
        ("seed", 2**64, "below 2"),
        ("keep", 0, "keep is 0"),
        ("eval_every", 0, "eval_every is 0"),
        ("save_every", -3, "save_every is -3"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{field: value})
    assert message in str(caught.value)


def test_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps is 9, but the run has only 4 steps"):
        TrainConfig(steps=4, warmup_steps=9)
    model, adapter = problem("numpy")
    with pytest.raises(ConfigError, match="warmup_steps is 9, but the run has only 3 steps"):
        train(model, adapter, counting(), TrainConfig(epochs=1, batch_size=4, warmup_steps=9))


def test_examples_are_checked_before_anything_runs() -> None:
    model, adapter = problem("numpy")
    with pytest.raises(DataError, match="no training examples"):
        train(model, adapter, [], FAST)
    with pytest.raises(DataError, match="no evaluation examples"):
        train(model, adapter, counting(), FAST, eval_examples=[])
    assert len(epoch_steps([len(e) for e in counting()], seed=0, epoch=0, batch_size=4)) == 3
