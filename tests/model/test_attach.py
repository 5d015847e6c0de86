"""An adapter is attached by reference; where a backend has a memory of its own it is trained there,
and its own arrays follow.

`Elsewhere` stands for a GPU: it computes as the NumPy backend does, on copies of what it is given.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import bits, counting, interrupt_after, problem
from whole_model import an_adapter

from pylora.adapters.adapter import Adapter, parameters
from pylora.backends.numpy import NumpyBackend
from pylora.errors import DtypeError, PlanError
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.training.train import TrainConfig, train


def test_an_adapter_is_attached_by_reference(ops: Any, rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    adapter = an_adapter(config, rng)
    net.attach(adapter)
    assert net.adapter is adapter
    before = ops.to_numpy(net.forward([1, 2])[0]).tobytes()
    adapter["lm_head"].B[...] *= 2
    assert ops.to_numpy(net.forward([1, 2])[0]).tobytes() != before


def test_an_adapter_that_does_not_fit_is_named_and_nothing_changes(
    rng: np.random.Generator,
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend="numpy")
    good = an_adapter(config, rng)
    net.attach(good)
    q = "model.layers.0.self_attn.q_proj"
    lora = good[q]
    for change, error, says in (
        ({"model.layers.7.mlp.up_proj": lora}, PlanError, r"model\.layers\.7\.mlp\.up_proj"),
        ({q: dataclasses.replace(lora, A=lora.A[:, 1:])}, PlanError, r"q_proj: A has shape \["),
        ({q: dataclasses.replace(lora, B=lora.B.T)}, PlanError, r"q_proj: B has shape \["),
        (
            {q: dataclasses.replace(lora, B=lora.B.astype(float))},
            DtypeError,
            "q_proj: B is float64",
        ),
        ({"model.embed_tokens": good["lm_head"]}, PlanError, "embed_tokens: A has shape"),
    ):
        with pytest.raises(error, match=says):
            net.attach({**good, **change})
        assert net.adapter is good
        assert all(net.modules[p].lora is lora for p, lora in good.items())


class Elsewhere(NumpyBackend):
    def place(self, a: np.ndarray) -> np.ndarray:
        return a.copy()


CONFIG = TrainConfig(steps=4, batch_size=3, learning_rate=1e-2, save_every=2, max_grad_norm=0.5)


def trained(ops: NumpyBackend) -> Adapter:
    model, adapter = problem(ops)
    train(model, adapter, counting(), CONFIG)
    return adapter


def test_training_elsewhere_gives_the_same_bits_in_the_adapters_own_arrays() -> None:
    here, there = trained(NumpyBackend()), trained(Elsewhere())
    assert bits(parameters(here)) == bits(parameters(there))
    assert any(lora.B.any() for lora in there.values())


def test_attached_arrays_are_copies_until_they_are_collected() -> None:
    model, adapter = problem(Elsewhere())
    model.attach(adapter)
    path = next(iter(adapter))
    model.placed[path].B[...] = 3
    assert not adapter[path].B.any()
    model.collect()
    assert (adapter[path].B == 3).all()


def test_a_run_that_was_cut_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(Elsewhere())
    model, adapter = problem(Elsewhere())
    with pytest.raises(KeyboardInterrupt):
        train(model, adapter, counting(), CONFIG, tmp_path, on_step=interrupt_after(2))
    assert any(lora.B.any() for lora in adapter.values())  # as far as it came
    model, again = problem(Elsewhere())
    train(model, again, counting(), CONFIG, tmp_path, resume=True)
    assert bits(parameters(again)) == bits(parameters(whole))
