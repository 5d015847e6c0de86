"""The estimate: its parts by hand, what changes it, and what a model that runs really keeps."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pylora import Adapter, Llama, LlamaConfig, LoraConfig, resolve
from pylora.adapters.plan import Plan
from pylora.training.config import TrainConfig
from pylora.training.estimate import Estimate, estimate, fitting, most_rows, ways

CONFIG = LlamaConfig.tiny()


class Checkpoint:
    """As much of one as an estimate looks at."""

    packed_as = None

    def __init__(self, config: LlamaConfig = CONFIG, kind: str = "f32") -> None:
        self.config, self.kind = config, kind

    def dtype(self, name: str) -> str:
        return self.kind


def plan(r: int = 8, config: LlamaConfig = CONFIG, **more: Any) -> Plan:
    lora = LoraConfig(r=r, target_modules=more.pop("targets", "all-linear"), **more)
    return resolve(lora, config.modules())


def of(settings: TrainConfig, lengths: list[int], precision: str = "fp32", **more: Any) -> Estimate:
    return estimate(Checkpoint(), more.pop("plan", plan()), precision, settings, lengths, 0, **more)


def test_the_parts_of_the_adapter_by_hand() -> None:
    n = plan().num_parameters
    found = of(TrainConfig(batch_size=4), [10] * 4)
    assert found.adapter == found.gradients == 4 * n and found.optimizer == 8 * n
    assert found.weights == 4 * sum(int(np.prod(s)) for s in CONFIG.tensors().values())
    assert of(TrainConfig(batch_size=4, accumulation=2), [10] * 4).gradients == 8 * n
    more = of(TrainConfig(batch_size=4), [10] * 4, whole=1000)
    assert more.optimizer - found.optimizer == 8000


def test_rows_are_those_of_the_largest_micro_batch() -> None:
    lengths = [10, 20, 30, 40]
    assert most_rows(TrainConfig(batch_size=4), lengths) == (100, 100)
    assert most_rows(TrainConfig(batch_size=4, accumulation=2), lengths)[0] == 70
    packed = TrainConfig(packing=True, max_tokens=50)
    assert most_rows(packed, lengths)[0] == 50


def test_what_layers_keep_is_what_is_counted() -> None:
    """The arrays that a forward pass leaves for backward, counted one by one."""
    model = Llama.random(CONFIG, seed=0)
    if model.ops.name != "c":
        pytest.skip("the estimate is for the c backend")
    lora = LoraConfig(r=8, target_modules="all-linear")
    model.attach(Adapter.init(resolve(lora, CONFIG.modules()), lora, seed=0))
    rows = 64
    _, cache = model.forward(np.arange(rows) % CONFIG.vocab_size)
    seen: dict[int, int] = {}

    def count(thing: Any, depth: int = 0) -> None:
        if isinstance(thing, np.ndarray):
            if thing.size >= rows:
                seen[thing.__array_interface__["data"][0]] = thing.nbytes
        elif isinstance(thing, (tuple, list)):
            for one in thing:
                count(one, depth + 1)
        elif type(thing).__name__.endswith("Cache") and depth < 6:
            for one in vars(thing).values():
                count(one, depth + 1)

    count(cache.trunk.blocks)
    gc.collect()
    small, large = (of(TrainConfig(batch_size=1), [n]) for n in (rows, 2 * rows))
    counted = large.activations - small.activations
    passing = rows * (4 * 3 * CONFIG.hidden_size + 4 * 3 * CONFIG.intermediate_size)
    assert counted - passing == pytest.approx(sum(seen.values()), rel=0.02)


def test_each_way_takes_less_and_the_first_that_fits_is_taken() -> None:
    config = replace(CONFIG, num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    some = ways(
        Checkpoint(config), plan(config=config), "fp32", TrainConfig(batch_size=8), [64] * 8, 0
    )
    assert [one.changed for one in some[:3]] == [
        (), ("--recompute",), ("--recompute", "--accumulation 2")
    ]  # fmt: skip
    assert some[-1].changed[-1] == "--precision int4" and some[-1].config.accumulation == 8
    activations = [one.estimate.activations for one in some[:5]]
    assert activations == sorted(activations, reverse=True)
    assert fitting(some, some[1].estimate.total) is some[1]
    assert fitting(some, some[0].estimate.total) is some[0] and fitting(some, 1) is None


def test_eight_bits_and_precisions_take_less() -> None:
    wide = plan(r=64)
    usual = of(TrainConfig(batch_size=1), [8], plan=wide)
    config = TrainConfig(batch_size=1, optimizer="adamw_8bit")
    large = replace(CONFIG, hidden_size=512, intermediate_size=1024)
    eight = estimate(Checkpoint(large), plan(64, large), "fp32", config, [8], 0)
    assert eight.optimizer < 0.5 * 8 * plan(64, large).num_parameters
    assert of(TrainConfig(batch_size=1), [8], "bf16").weights < usual.weights
    q4 = Checkpoint(replace(CONFIG, hidden_size=64, intermediate_size=64), "q4_1")
    blocks = estimate(q4, plan(config=q4.config), "int4", TrainConfig(), [8], 0).weights
    assert (
        blocks < 0.25 * estimate(q4, plan(config=q4.config), "fp32", TrainConfig(), [8], 0).weights
    )
