"""Blocks, forward and backward: what is skipped, kept, run again and used up."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from whole_model import ARCHITECTURES, SEQS, a_batch, an_adapter, bits

from pylora import backends
from pylora.errors import PyloraError
from pylora.model.config import LlamaConfig
from pylora.model.llama import DropKey, Llama
from pylora.types import Seqs


@pytest.mark.parametrize(
    "only", [("lm_head",), ("1.mlp.down_proj",), ("0.mlp.up_proj",), ("1.self_attn.v_proj",),
             ("0.self_attn.o_proj", "1.mlp.gate_proj"), ("embed_tokens",)]
)  # fmt: skip
def test_what_is_skipped_below_the_lowest_adapter_changes_no_gradient(
    ops: Any, rng: np.random.Generator, only: tuple[str, ...]
) -> None:
    """Against the same adapter among zero-B adapters everywhere, where nothing may be skipped."""
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    ids, labels = a_batch(rng, config)
    some = an_adapter(config, rng, only=only)
    net.attach(some)
    nll, few = net.loss(ids, labels, SEQS)
    net.attach({**an_adapter(config, rng, zero_b=True), **some})
    nll_all, many = net.loss(ids, labels, SEQS)
    assert few is not None and many is not None and set(few) == set(some)
    assert nll.tobytes() == nll_all.tobytes()
    assert bits(ops, few).items() <= bits(ops, many).items()


def test_blocks_below_the_lowest_adapter_keep_and_compute_nothing(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    config = LlamaConfig.tiny(num_hidden_layers=3)
    net = Llama.random(config, backend="numpy")
    net.attach(an_adapter(config, rng, only=("1.mlp.down_proj",)))
    ids, labels = a_batch(rng, config)
    logits, cache = net.forward(ids, SEQS)
    assert [c is None for c in cache.trunk.blocks] == [True, False, False]
    calls: list[str] = []
    for op in ("attention_backward", "rms_norm_backward", "swiglu_backward"):
        original = getattr(net.ops, op)
        monkeypatch.setattr(
            net.ops, op, lambda *a, op=op, f=original, **k: calls.append(op) or f(*a, **k)
        )
    assert list(net.backward(logits, cache)) == ["model.layers.1.mlp.down_proj"]
    # The final norm, then the whole of layer 2, then nothing but layer 1's down_proj.
    assert calls == [
        "rms_norm_backward",
        "swiglu_backward",
        "rms_norm_backward",
        "attention_backward",
        "rms_norm_backward",
    ]


def test_recomputing_gives_the_same_bits(ops: Any, rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny(**ARCHITECTURES["qwen3"])
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, dropout=0.2, biases=True))
    ids, labels = a_batch(rng, config)
    runs = []
    for recompute in (False, True):
        nll, grads = net.loss(ids, labels, SEQS, drop=DropKey(1, 2), recompute=recompute)
        assert grads is not None
        runs.append((nll.tobytes(), bits(ops, grads)))
    assert runs[0] == runs[1]


def test_a_cache_is_good_for_one_backward(rng: np.random.Generator) -> None:
    net = Llama.random(LlamaConfig.tiny(), backend="numpy")
    net.attach(an_adapter(net.config, rng, only=("1.mlp.down_proj",)))
    logits, cache = net.forward([1, 2, 3])
    net.attach(an_adapter(net.config, rng, only=("0.mlp.down_proj",)))
    with pytest.raises(PyloraError, match="run forward again"):
        net.backward(logits, cache)
    logits, cache = net.forward([1, 2, 3])
    net.backward(logits, cache)
    with pytest.raises(PyloraError, match="run forward again"):
        net.backward(logits, cache)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_like_the_one_before_takes_no_memory_from_the_system(
    rng: np.random.Generator, precision: str
) -> None:
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    ops: Any = backends.get("c")
    config = LlamaConfig.tiny(
        hidden_size=64,
        intermediate_size=192,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=300,
        max_position_embeddings=512,
    )
    net = Llama.random(config, backend="c", precision=precision)
    net.attach(an_adapter(config, rng))
    ids, labels = rng.integers(0, config.vocab_size, (2, 512))
    ops.trim()

    def step() -> None:
        net.loss(ids, labels, Seqs.of([512]))

    step()
    step()
    before = ops.memory()
    assert before["peak"] > 2 << 20, "the arrays are too small to come from the pool"
    tracemalloc.start()
    try:
        step()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ops.memory() == before
    # What is below 64 KiB is NumPy's: of each of the 16 modules h and the gradients, of each norm
    # a number for each row; and Python's own objects.
    assert most < 1 << 20
