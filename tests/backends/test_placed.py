"""A backend with a memory of its own: the adapter is trained there, and its own arrays follow.

`Elsewhere` stands for a GPU: it computes as the NumPy backend does, on copies of what it is given.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training import bits, counting, interrupt_after, problem

from pylora.adapters.adapter import Adapter, parameters
from pylora.backends.numpy import NumpyBackend
from pylora.training.train import TrainConfig, train


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
