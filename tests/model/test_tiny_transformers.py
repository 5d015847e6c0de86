"""Whole tiny transformers of every shape that the kit draws: what must hold of each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

pytest.importorskip("hypothesis")
from bounds import gamma
from hypothesis import HealthCheck, given, settings
from small_models import STEP

from pylora import backends
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.conformance import tiny_transformers
from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.model.weights import random_weights
from pylora.types import LoRA, Seqs

some = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def made(p: Any, dtype: Any = np.float32) -> tuple[LlamaConfig, dict[str, LoRA], np.ndarray, Seqs]:
    """The model's settings, an adapter with random A and B for it, a batch of ids and its rows."""
    config, rng = LlamaConfig.from_hf(p.config), np.random.default_rng(p.seed)
    fields = {k: v for k, v in p.lora.items() if k != "peft_type"}
    plan = resolve(LoraConfig(**fields), config.modules())
    adapter = {
        e.path: LoRA(
            rng.standard_normal((e.r, e.k)).astype(dtype) / 3,
            rng.standard_normal((e.d, e.r)).astype(dtype) / 3,
            e.scale,
        )
        for e in plan.entries
    }
    seqs = Seqs.of(list(p.lengths))
    return config, adapter, rng.integers(0, config.vocab_size, sum(p.lengths)), seqs


@given(tiny_transformers())
@some
def test_the_configuration_is_what_files_hold(p):
    config, adapter, _, _ = made(p)
    assert config.to_hf() == p.config and config.tensors() == p.tensors
    layers, targets = config.num_hidden_layers, set(p.lora["target_modules"])
    assert len(adapter) == layers * len(targets)
    for path, lora in adapter.items():
        r = p.lora.get("rank_pattern", {}).get(path.rsplit(".", 1)[1], p.lora["r"])
        special = p.lora.get("alpha_pattern", {})
        here = [k for k in special if k.split("\\.")[1] in path.split(".")]
        here = [k for k in here if k.endswith("*" + path.rsplit(".", 1)[1])]
        alpha = special[here[0]] if here else p.lora["lora_alpha"]
        assert lora.rank == r
        assert lora.scale == pytest.approx(alpha / (np.sqrt(r) if p.lora["use_rslora"] else r))


@pytest.mark.parametrize("name", ["numpy", "c"])
def test_bits(name):
    """B = 0 is the base, a sequence alone is itself in the batch, and detaching restores."""
    ops = backends.get(name)

    @given(tiny_transformers())
    @some
    def holds(p):
        config, adapter, ids, seqs = made(p)
        net = Llama.random(config, seed=p.seed, backend=ops)
        base = ops.to_numpy(net.forward(ids, seqs)[0]).tobytes()
        zero = {q: dataclasses.replace(x, B=np.zeros_like(x.B)) for q, x in adapter.items()}
        net.attach(zero)
        assert ops.to_numpy(net.forward(ids, seqs)[0]).tobytes() == base
        net.attach(adapter)
        whole = ops.to_numpy(net.forward(ids, seqs)[0])
        at = 0
        for n in p.lengths:
            alone = ops.to_numpy(net.forward(ids[at : at + n])[0])
            assert alone.tobytes() == whole[at : at + n].tobytes()
            at += n
        net.detach()
        assert ops.to_numpy(net.forward(ids, seqs)[0]).tobytes() == base

    holds()


@given(tiny_transformers())
@some
def test_gradients_are_the_slope_of_the_loss(p):
    """Along one random direction through all A and B at once, by complex step."""
    config, adapter, ids, seqs = made(p, np.float64)
    real = Llama.random(config, seed=p.seed, backend="numpy", dtype=np.float64)
    shadow = Llama(config, random_weights(config, p.seed, np.complex128), backend="numpy")
    rng, labels = np.random.default_rng(p.seed + 1), np.roll(ids, -1)
    real.attach(adapter)
    _, grads = real.loss(ids, labels, seqs, weight=1.0)
    slope, twin = 0.0, {}
    for path, lora in adapter.items():
        move = [rng.standard_normal(a.shape) for a in (lora.A, lora.B)]
        A, B = (a + 1j * STEP * d for a, d in zip((lora.A, lora.B), move))
        twin[path] = dataclasses.replace(lora, A=A, B=B)
        slope += (grads[path].A * move[0]).sum() + (grads[path].B * move[1]).sum()
    shadow.attach(twin)
    want = shadow.loss(ids, labels, seqs, grads=False)[0].imag.sum() / STEP
    size = sum(abs(g.A).sum() + abs(g.B).sum() for g in grads.values())
    # A chain of fewer than 2^15 roundings, as in test_llama, of the magnitudes that are added up; 1
    # for what cancels before (the scores of a sequence of one token have no slope).
    assert abs(slope - want) <= gamma(2**15, np.float64) * (1 + size + abs(want))
