"""Whole weights that are trained: gradients by central differences in every structure, and that a
model computes with the numbers that training left."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from adapters_made import make
from whole_model import SEQS, a_batch, an_adapter, bits

from pylora.adapters.adapter import Adapter
from pylora.model.config import LlamaConfig
from pylora.model.linear import DropKey
from pylora.model.llama import Grads, Llama, random_weights
from pylora.model.whole import Whole

ON_GPU = True
LAYER_NORM: dict[str, Any] = {"norm": "layer", "norm_bias": True}
BIASES: dict[str, Any] = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
STRUCTURES: dict[str, dict[str, Any]] = {
    "llama, tied": {},
    "qwen3, biases": {
        "model_type": "qwen3", "qk_norm": True, "tie_word_embeddings": False, **BIASES,
    },
    "olmo2": {
        "model_type": "olmo2", "norm_places": "after", "qk_norm": True, "qk_norm_of": "whole",
    },
    "gemma2": {
        "model_type": "gemma2", "norm_places": "both", "activation": "gelu_tanh",
        "embedding_multiplier": 4.0, "logit_softcap": 3.0,
    },
    "cohere": {
        "model_type": "cohere", "parallel": "one", "norm": "layer", "qk_norm": True,
        "qk_norm_of": "each", "logit_multiplier": 0.5,
    },
    "stablelm": {
        "model_type": "stablelm", "parallel": "one", "qk_norm": True, "qk_norm_of": "each",
        **LAYER_NORM,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "parallel": "two", "gated": False, "fused_qkv": "groups",
        "activation": "gelu_erf", "tie_word_embeddings": False, **LAYER_NORM, **BIASES,
    },
    "gpt2": {
        "model_type": "gpt2", "gated": False, "activation": "gelu_tanh", "learned_positions": True,
        "fused_qkv": "blocks", **LAYER_NORM, **BIASES,
    },
    "phi3": {"model_type": "phi3", "fused_qkv": "blocks", "fused_gate_up": True},
    "granite": {"model_type": "granite", "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "experts": {
        "model_type": "qwen3_moe", "qk_norm": True, "head_dim": 8, "experts": 3,
        "experts_per_token": 2, "expert_size": 16,
    },
}  # fmt: skip


class Mapped(dict[str, Any]):
    """A mapping of LoRAs with whole weights."""

    whole: Whole


def trained_of(config: LlamaConfig) -> list[str]:
    """Every tensor but those of experts."""
    return [n for n in config.tensors() if f".{config.names.experts}." not in n]


def model_of(
    config: LlamaConfig, names: Iterable[str], dtype: Any = np.float64, **how: Any
) -> tuple[Llama, Mapped]:
    """A model, and an adapter attached to it that trains these tensors."""
    rng, adapter = np.random.default_rng(1), Mapped()
    weights, shapes = random_weights(config, 3, dtype), config.tensors()
    own = {n: weights(n) + 0.1 * rng.standard_normal(shapes[n]).astype(dtype) for n in names}
    adapter.whole = Whole(own, was_tied=config.tie_word_embeddings).train(own)
    model = Llama(config, weights, **how)
    model.attach(adapter)
    return model, adapter


def gradients_of(model: Llama, **how: Any) -> Grads:
    ids, labels = a_batch(np.random.default_rng(2), model.config)
    _, grads = model.loss(ids, labels, SEQS, **how)
    assert grads is not None
    return grads


def value(model: Llama) -> float:
    ids, labels = a_batch(np.random.default_rng(2), model.config)
    nll, _ = model.loss(ids, labels, SEQS, grads=False)
    return float(nll.sum()) / int((labels >= 0).sum())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_by_central_differences(structure: str) -> None:
    """Along a random direction of each tensor: off by O(h⁴) and by rounding / h, both far below
    what a wrong term would be."""
    config = LlamaConfig.tiny(**STRUCTURES[structure])
    names = trained_of(config)
    model, adapter = model_of(config, names, backend="numpy")
    grads, rng, h = gradients_of(model), np.random.default_rng(5), 1e-4
    assert set(model.whole_arrays) == set(names)
    for name, array in adapter.whole.trained.items():
        path, _, part = name.rpartition(".")
        grad = getattr(grads[path], part)
        assert grad.shape == array.shape, name
        way, was = rng.standard_normal(array.shape), array.copy()
        found = []
        for step in (h, -h, 2 * h, -2 * h):
            array[...] = was + step * way
            model.renew()
            found.append(value(model))
        array[...] = was
        model.renew()
        slope = (8 * (found[0] - found[1]) - (found[2] - found[3])) / (12 * h)
        want = float((grad * way).sum())
        assert abs(slope - want) <= 1e-6 * (1 + abs(want)), (name, slope, want)
        assert abs(want) > 1e-5, f"{name} has no part in the loss, so nothing is tested"


def module_of(name: str) -> str:
    """The module of a tensor; norms of single heads are one."""
    return re.sub(r"\.norms\.\d+$", "", name.rpartition(".")[0])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_alone_has_the_gradient_that_it_has_among_all(structure: str, ops: Any) -> None:
    """What is not needed is not computed, and what is, is: the lowest weight decides."""
    config = LlamaConfig.tiny(**STRUCTURES[structure])
    names = trained_of(config)
    every, adapter = model_of(config, names, np.float32, backend=ops)
    want = bits(ops, gradients_of(every))
    modules = list(dict.fromkeys(map(module_of, names)))
    for module in modules[:: 1 if ops.name in ("numpy", "c") else 5]:
        own = {name for name in names if module_of(name) == module}
        adapter.whole.trained.clear()
        every.detach()
        adapter.whole.train(own)
        every.attach(adapter)
        assert bits(ops, gradients_of(every)) == {n: want[n] for n in own}


def test_with_dropout_and_recomputation_beside_lora(ops: Any) -> None:
    """Gradients of whole weights beside A and B, the same bits when blocks run again."""
    config = LlamaConfig.tiny(model_type="qwen3", qk_norm=True, head_dim=8)
    rng = np.random.default_rng(0)
    names = [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
    ]
    model, adapter = model_of(config, names, np.float32, backend=ops)
    adapter.update(an_adapter(config, rng, only=("q_proj", "down_proj"), dropout=0.3))
    model.attach(adapter)
    key = DropKey(3, 1)
    plain = bits(ops, gradients_of(model, drop=key))
    again = bits(ops, gradients_of(model, drop=key, recompute=True))
    assert plain == again
    assert {n for n in plain if n.endswith(".weight")} == set(names)
    assert any(n.endswith(".A") for n in plain)


ROWS = (5, 2, 60)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_trained_as_the_rows_of_the_whole_table_are(tied: bool, ops: Any) -> None:
    config = LlamaConfig.tiny(tie_word_embeddings=tied)
    table = "model.embed_tokens.weight"
    model, adapter = model_of(config, [table], np.float32, backend=ops)
    want = ops.to_numpy(gradients_of(model)["model.embed_tokens"].weight)
    other = Mapped()
    other.whole = Whole(dict(adapter.whole.tensors), {table: ROWS}, was_tied=tied).train([table])
    model.detach()
    model.attach(other)
    got = ops.to_numpy(gradients_of(model)["model.embed_tokens"].weight)
    # Sums of the same terms in the same order, of the head with other rows beside them.
    assert got.shape == (3, 24) and np.abs(got - want[list(ROWS)]).max() <= 1e-6
    before = ops.to_numpy(model.forward([5, 2, 7])[0]).copy()
    model.whole_arrays[table][1] += 1
    model.renew()
    model.collect()
    after = ops.to_numpy(model.forward([5, 2, 7])[0])
    assert np.array_equal(other.whole.tensors[table][2], other.whole.trained[table][1])
    assert np.array_equal(after[0], before[0]) or tied
    assert not np.array_equal(after[1], before[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_it_computes_with_what_training_left(precision: str) -> None:
    """As a model does that is made of those numbers: bits of logits, and of tokens one by one."""
    config = LlamaConfig.tiny(
        hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=False
    )
    names = ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    plain = make(1, modules=config.modules(), init_lora_weights=False)
    model, first = model_of(config, names, np.float32, backend="c", precision=precision)
    adapter = Adapter(plain.config, plain.plan, dict(plain), first.whole)
    model.attach(adapter)
    model.decode([1, 2], model.kv_cache(1, 4), [2])
    for array in model.whole_arrays.values():
        array += np.float32(0.25)
    model.renew()
    weights = random_weights(config, 3)
    own = adapter.whole.tensors  # type: ignore[union-attr]
    made = Llama(
        config, lambda n: own.get(n, None) if n in own else weights(n),
        backend="c", precision=precision,
    )  # fmt: skip
    made.attach(plain)
    ids = [1, 2, 3, 4]
    assert np.array_equal(model.forward(ids)[0], made.forward(ids)[0])
    for one in (model, made):
        one.last = one.decode(ids, one.kv_cache(1, 4), [4])  # type: ignore[attr-defined]
    assert np.array_equal(model.last, made.last)  # type: ignore[attr-defined]
    model.detach()
    base = Llama(config, weights, backend="c", precision=precision)
    assert np.array_equal(model.forward(ids)[0], base.forward(ids)[0])
