"""Training of whole weights: a run learns with them, and its promises hold for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rank_threads import together
from training import bits, counting, interrupt_after

from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.adapters.whole import fresh_whole, num_whole
from pylora.errors import ConfigError, PlanError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama, random_weights
from pylora.training.config import TrainConfig
from pylora.training.examples import Example
from pylora.training.objectives.choose import choose
from pylora.training.optimizer import trainable
from pylora.training.train import train

FAST = TrainConfig(steps=4, batch_size=4, learning_rate=0.02, weight_decay=0.01)
KINDS: dict[str, dict[str, Any]] = {
    "both tables and norms": {"modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows": {"trainable_token_indices": [5, 18, 60]},
    "a layer's own": {"modules_to_save": ["layers.1.self_attn", "0.mlp.up_proj"]},
}


def problem(ops: Any, seed: int = 0, **lora: Any) -> tuple[Llama, Adapter]:
    """A tiny random model, and a fresh adapter that trains some of its weights whole."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    config, model = LoraConfig(**{**settings, **lora}), LlamaConfig.tiny()
    base = random_weights(model, seed)
    plan, whole = resolve(config, model.modules()), fresh_whole(config, model, base)
    return Llama(model, base, backend=ops), Adapter.init(plan, config, seed=1, whole=whole)


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_the_base_and_learns(ops: Any, kind: str, tmp_path: Path) -> None:
    model, adapter = problem(ops, **KINDS[kind])
    ids = counting()[0].ids
    base = ops.to_numpy(model.forward(ids)[0]).copy()
    model.attach(adapter)
    assert np.array_equal(ops.to_numpy(model.forward(ids)[0]), base), "a fresh one is the base"
    before = {name: a.copy() for name, a in trainable(adapter).items()}
    assert sum(a.size for a in before.values()) == adapter.num_parameters
    sizes = num_whole(adapter.config, model.home_config)
    assert sizes == sum(a.size for a in adapter.beside.values()) > 0
    run = replace(FAST, steps=30, learning_rate=0.01)
    result = train(model, adapter, counting(), run, tmp_path / "run")
    assert result.losses[-1] < 0.85 * result.losses[0]
    for name, array in trainable(adapter).items():
        assert not np.array_equal(array, before[name]), f"{name} was not trained"
    trained = ops.to_numpy(model.forward(ids)[0]).copy()
    model.detach()
    assert np.array_equal(ops.to_numpy(model.forward(ids)[0]), base), "the base is as it was"
    base_of = random_weights(model.config, 0)
    saved = Adapter.load(tmp_path / "run" / "adapter", model.config, base=base_of)
    assert saved.digest() == adapter.digest()
    model.attach(saved)
    assert np.array_equal(ops.to_numpy(model.forward(ids)[0]), trained)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_continues_with_the_same_bits(
    ops: Any, kind: str, tmp_path: Path
) -> None:
    ends = []
    for name, stop in (("whole", None), ("cut", 2)):
        model, adapter = problem(ops, **KINDS[kind])
        out = tmp_path / name
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train(model, adapter, counting(), FAST, out, on_step=interrupt_after(stop))
            model, adapter = problem(ops, **KINDS[kind])
        result = train(model, adapter, counting(), FAST, out, resume=bool(stop))
        ends.append((result.losses, bits(trainable(adapter)), adapter.digest()))
    assert ends[0] == ends[1]
    # Another choice of weights is another run.
    other, small = problem(ops, modules_to_save=["layers.0.mlp"])
    with pytest.raises(ConfigError, match="whole model.layers.0.mlp"):
        train(other, small, counting(), FAST, tmp_path / "cut", resume=True)


def test_eight_bit_moments_smoothed_labels_and_noise_go_with_them(
    ops: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pylora.training.optimizer8.SMALLEST", 256)
    run = replace(
        FAST, optimizer="adamw_8bit", label_smoothing_factor=0.1, neftune_noise_alpha=5.0
    )  # fmt: skip
    ends = []
    for name, stop in (("at once", None), ("cut", 2)):
        model, adapter = problem(ops, **KINDS["both tables and norms"])
        if stop:
            with pytest.raises(KeyboardInterrupt):
                train(model, adapter, counting(), run, tmp_path, on_step=interrupt_after(stop))
            model, adapter = problem(ops, **KINDS["both tables and norms"])
        out = tmp_path / name if not stop else tmp_path
        losses = train(model, adapter, counting(), run, out, resume=bool(stop)).losses
        ends.append((losses, bits(trainable(adapter))))
    assert ends[0] == ends[1]
    model, adapter = problem(ops, **KINDS["both tables and norms"])
    assert train(model, adapter, counting(), FAST).losses != ends[0][0]


def test_a_run_ends_with_the_best_of_its_weights(ops: Any, tmp_path: Path) -> None:
    model, adapter = problem(ops, **KINDS["rows"], modules_to_save=["norm"])
    tokens = np.random.default_rng(0).integers(0, 61, 40).tolist()  # which no rule foretells
    other = [Example.of(tokens, [False] + [True] * 39, "random")]
    run = replace(FAST, learning_rate=0.1, steps=6, eval_every=1, best_by="loss", save_every=1)
    run = replace(run, schedule="constant")
    result = train(model, adapter, counting(), run, tmp_path, other)
    assert result.best_step is not None and result.best_step < 6
    best = dict(result.evaluations)[result.best_step]
    again = train(model, adapter, counting(), run, tmp_path / "x", other)
    assert again.evaluations[0][1].nll == best.nll, "the adapter is that of the best evaluation"


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_recomputation_and_processes_change_no_bit(ops: Any, kind: str) -> None:
    def end(how: TrainConfig, **more: Any) -> Any:
        model, adapter = problem(ops, **KINDS[kind], lora_dropout=0.1)
        losses = train(model, adapter, counting(), how, **more).losses
        return losses, bits(trainable(adapter))

    split = replace(FAST, accumulation=3)
    one = end(split)
    assert end(replace(split, recompute=True)) == one
    if ops.name in ("numpy", "c"):
        assert together(3, lambda ranks: end(split, ranks=ranks)) == [one] * 3
    whole = end(FAST)
    np.testing.assert_allclose(whole[0], one[0], rtol=1e-4)


def test_threads_change_no_bit() -> None:
    from pylora import backends

    ops: Any = backends.get("c")
    before, ends = ops.num_threads, []
    try:
        for threads in (1, 3):
            ops.set_num_threads(threads)
            model, adapter = problem(ops, **KINDS["both tables and norms"])
            losses = train(model, adapter, counting(), FAST).losses
            ends.append((losses, bits(trainable(adapter))))
    finally:
        ops.set_num_threads(before)
    assert ends[0] == ends[1]


def test_other_objectives_train_them_too(tmp_path: Path) -> None:
    """DPO goes by the base's likelihoods, for which the adapter is taken away meanwhile."""
    from preferences import preferences

    model, adapter = problem("numpy", modules_to_save=["norm", "lm_head"])
    before = bits(adapter.beside)
    run = replace(FAST, steps=12)
    result = train(model, adapter, preferences(), run, tmp_path, objective=choose("dpo"))
    assert result.losses[0] == pytest.approx(np.log(2), rel=1e-5), "it begins as the base"
    assert result.losses[-1] < 0.5 and bits(adapter.beside) != before


def test_what_cannot_be_trained_is_named() -> None:
    moe = LlamaConfig.tiny(
        model_type="qwen3_moe", qk_norm=True, experts=2, experts_per_token=1, expert_size=8
    )
    tiny = LlamaConfig.tiny()
    base = random_weights(tiny)

    def config(**more: Any) -> LoraConfig:
        return LoraConfig(target_modules=["q_proj"], **more)

    with pytest.raises(UnsupportedError, match="experts are neither read nor trained whole"):
        fresh_whole(config(modules_to_save=["experts.0"]), moe, base)
    with pytest.raises(PlanError, match="'nonsense' matches no module"):
        fresh_whole(config(modules_to_save=["nonsense"]), tiny, base)
    with pytest.raises(PlanError, match=r"the token 61, and the\s+vocabulary has 61"):
        fresh_whole(config(trainable_token_indices=[3, 61]), tiny, base)
    with pytest.raises(PlanError, match="trained whole already"):
        fresh_whole(
            config(trainable_token_indices=[3], modules_to_save=["embed_tokens"]), tiny, base
        )
    both = LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[3])
    plan, whole = resolve(both, tiny.modules()), fresh_whole(both, tiny, base)
    with pytest.raises(PlanError, match="both LoRA .* and rows"):
        Adapter.init(plan, both, whole=whole)
    with pytest.raises(ConfigError, match="fresh_whole"):
        Adapter.init(plan, both)
    named = config(modules_to_save=["norm"])
    plan = resolve(named, tiny.modules())
    with pytest.raises(UnsupportedError, match="no other weights of the base: norm"):
        choose("classify").fresh(plan, named, 0, Llama.random(tiny), (), base)
