"""Adapters: initial values, digest, trainable arrays, the sum of adapters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from adapters_made import MODULES, delta, filled, make
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters.adapter import Adapter, parameters
from pylora.errors import ConfigError, PlanError, UnsupportedError
from pylora.model.config import LlamaConfig
from pylora.numbers import random
from pylora.types import LoRA

CONFIG = LlamaConfig.tiny()
Q0 = "model.layers.0.self_attn.q_proj"
EMBED = "model.embed_tokens"


def test_a_fresh_adapter_has_b_zero_and_a_within_the_kaiming_bound() -> None:
    adapter = make(r=4, lora_alpha=8)
    assert len(adapter) == 4
    assert Q0 in adapter
    for path, lora in adapter.items():
        spec = MODULES[path]
        assert lora.A.shape == (4, spec.k)
        assert lora.B.shape == (spec.d, 4)
        assert lora.scale == 2.0
        assert not lora.B.any()
        assert 0.5 / math.sqrt(spec.k) < abs(lora.A).max() <= 1 / math.sqrt(spec.k)


def test_gaussian_has_the_deviation_one_over_r() -> None:
    A = make(init_lora_weights="gaussian", r=64, target_modules=[Q0])[Q0].A
    n = A.size
    assert abs(A.std() * 64 - 1) < 5 / math.sqrt(2 * n)


def test_init_false_fills_b_and_its_bias_too() -> None:
    lora = make(init_lora_weights=False, lora_bias=True, r=4, target_modules=[Q0])[Q0]
    assert lora.bias is not None
    for array in (lora.B, lora.bias):
        assert 0.25 < abs(array).max() <= 0.5
    assert not make(lora_bias=True, target_modules=[Q0])[Q0].bias.any()  # type: ignore[union-attr]


def test_an_embedding_starts_with_a_zero_and_b_normal() -> None:
    lora = make(target_modules=["embed_tokens"], r=5)[EMBED]
    assert lora.A.shape == (5, CONFIG.vocab_size)
    assert lora.B.shape == (CONFIG.hidden_size, 5)
    assert not lora.A.any()
    assert abs(lora.B.std() - 1) < 5 / math.sqrt(2 * lora.B.size)
    both = make(target_modules=["embed_tokens"], r=5, init_lora_weights=False)[EMBED]
    assert both.A.any()
    assert not np.array_equal(both.A.reshape(-1)[:25], both.B.reshape(-1)[:25])


def test_values_depend_on_seed_path_and_element_alone() -> None:
    few, many = make(7, target_modules=[Q0]), make(7, target_modules="all-linear")
    assert few[Q0].A.tobytes() == many[Q0].A.tobytes()
    assert few[Q0].A.tobytes() != make(8, target_modules=[Q0])[Q0].A.tobytes()
    bound = 1 / math.sqrt(24)
    want = random.uniform((8, 24), bound, seed=7, stream=random.stream("init", Q0))
    assert few[Q0].A.tobytes() == want.tobytes()


def test_read_only_initialisations_cannot_be_made() -> None:
    with pytest.raises(UnsupportedError, match="eva"):
        make(init_lora_weights="eva")


def test_base_biases_start_as_the_bases() -> None:
    modules = LlamaConfig.tiny(model_type="qwen2", attention_bias=True).modules()
    bias = {f"{p}.bias": np.full(s.d, 3, np.float32) for p, s in modules.items() if s.bias}
    adapter = make(modules=modules, base=bias.__getitem__, bias="all", target_modules=["q_proj"])
    key = Q0.replace("q_proj", "k_proj")
    assert adapter[Q0].base_bias.tolist() == [3.0] * 24  # type: ignore[union-attr]
    assert adapter[key].rank == 0
    assert adapter[key].base_bias.tolist() == [3.0] * 12  # type: ignore[union-attr]
    adapter[Q0].base_bias[0] = 9  # type: ignore[index]
    assert bias[f"{Q0}.bias"][0] == 3
    with pytest.raises(ConfigError, match=r"base=checkpoint.load"):
        make(modules=modules, bias="lora_only", target_modules=["q_proj"])


def test_parameters_are_the_arrays_themselves() -> None:
    adapter = make(target_modules=[Q0, "embed_tokens"])
    named = parameters(adapter)
    assert list(named) == [
        f"base_model.model.{EMBED}.lora_embedding_A",
        f"base_model.model.{EMBED}.lora_embedding_B",
        f"base_model.model.{Q0}.lora_A.weight",
        f"base_model.model.{Q0}.lora_B.weight",
    ]
    before = adapter.digest()
    named[f"base_model.model.{Q0}.lora_B.weight"][0, 0] = 1
    assert adapter[Q0].B[0, 0] == 1
    assert adapter.digest() != before
    assert adapter.num_parameters == adapter.plan.num_parameters


def test_digest_sees_the_scale_and_not_the_order() -> None:
    assert make(lora_alpha=1).digest() != make(lora_alpha=2).digest()
    one = make(target_modules=["q_proj", "down_proj"]).digest()
    assert one == make(target_modules=["down_proj", "q_proj"]).digest()


def test_modules_that_differ_from_the_plan_are_refused() -> None:
    adapter = make(r=2)
    modules = dict(adapter)
    with pytest.raises(PlanError, match="differ: model.layers.0.self_attn.q_proj"):
        Adapter(adapter.config, adapter.plan, {p: m for p, m in modules.items() if p != Q0})
    wrong = modules | {Q0: LoRA(np.zeros((2, 5), np.float32), modules[Q0].B, 1.0)}
    with pytest.raises(PlanError, match=r"q_proj.lora_A.weight: got shape \(2, 5\)"):
        Adapter(adapter.config, adapter.plan, wrong)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(-3, 3, width=32), st.floats(-3, 3, width=32))
def test_a_stack_is_the_weighted_sum(r1: int, r2: int, w1: float, w2: float) -> None:
    a = filled(1, r=r1, lora_alpha=3, target_modules=["q_proj"], rank_pattern={Q0: 2})
    b = filled(2, r=r2, use_rslora=True, target_modules=["q_proj", "embed_tokens"])
    both = Adapter.stack([(a, w1), (b, w2)])
    assert both[Q0].rank == 2 + r2
    assert {lora.scale for lora in both.values()} == {1.0}
    for path in both:
        want, size = 0.0, 0.0
        for adapter, w in ((a, w1), (b, w2)):
            if path in adapter:
                want = want + w * delta(adapter, path)
                lora = adapter[path]
                size = size + abs(w * lora.scale) * (abs(lora.B) @ abs(lora.A)).astype(np.float64)
        # B is rounded once to float32; subnormal B adds at most half of the smallest one per rank.
        A = both[path].A.astype(np.float64)
        bound = 2.0**-23 * size + 2.0**-149 * abs(A).sum(axis=0)
        assert (abs(delta(both, path) - want) <= bound).all()


def test_a_stack_saves_and_loads_as_itself(tmp_path: Any) -> None:
    a = filled(1, r=2, target_modules=["q_proj"], lora_bias=True)
    b = filled(2, r=3, target_modules=["down_proj", Q0])
    both = Adapter.stack([(a, 0.5), (b, 2.0)])
    assert both[Q0].bias.tolist() == (np.float32(2.0) * a[Q0].bias).tolist()  # type: ignore[union-attr,operator]
    both.save(tmp_path / "both")
    assert Adapter.load(tmp_path / "both", MODULES).digest() == both.digest()


def test_what_cannot_be_stacked() -> None:
    with pytest.raises(ConfigError, match="nothing to stack"):
        Adapter.stack([])
    with pytest.raises(ConfigError, match="nan"):
        Adapter.stack([(make(), float("nan"))])
    other = make(modules=LlamaConfig.tiny(hidden_size=32).modules())
    with pytest.raises(PlanError, match="different models"):
        Adapter.stack([(make(), 1.0), (other, 1.0)])
    modules = LlamaConfig.tiny(model_type="qwen2", attention_bias=True).modules()
    biased = make(modules=modules, bias="lora_only", base=lambda name: np.zeros(24, np.float32))
    with pytest.raises(UnsupportedError, match="lora_only"):
        Adapter.stack([(biased, 1.0)])
