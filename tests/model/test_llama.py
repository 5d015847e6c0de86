"""The whole model: gradients by complex step, and the equalities that must hold bit for bit."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from small_models import STEP
from whole_model import (
    ARCHITECTURES,
    LENGTHS,
    SEQS,
    TOLERANCE,
    M,
    a_batch,
    an_adapter,
    arrays,
    bits,
    to_complex,
)

from pylora import backends
from pylora.errors import ConfigError, DataError, DtypeError, ShapeError
from pylora.model.config import LlamaConfig
from pylora.model.llama import DropKey, Llama
from pylora.model.weights import random_weights
from pylora.numbers.precision import from_bf16, to_bf16
from pylora.types import Seqs


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_gradient_is_the_slope_of_the_loss(
    rng: np.random.Generator, name: str, dropout: float
) -> None:
    """All modules at once; the slope along a random direction of each array, by complex step."""
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    real = Llama.random(config, backend="numpy", dtype=np.float64)
    shadow = Llama.random(config, backend="numpy", dtype=np.complex128)
    adapter = an_adapter(config, rng, dtype=np.float64, biases=True, dropout=dropout)
    ids, labels = a_batch(rng, config)
    weight = rng.uniform(0.1, 1.0, M)
    key = DropKey(7, 3) if dropout else None
    real.attach(adapter)
    nll, grads = real.loss(ids, labels, SEQS, weight=weight, drop=key)
    assert grads is not None and sorted(grads) == sorted(config.modules())
    twin = to_complex(adapter)
    shadow.attach(twin)
    got, want = [], []
    for path, lora in twin.items():
        for array_name, array in arrays(lora).items():
            direction = rng.standard_normal(array.shape)
            array += STEP * 1j * direction
            moved, _ = shadow.loss(ids, labels, SEQS, drop=key, grads=False)
            array.imag = 0
            np.testing.assert_allclose(moved.real, nll, rtol=TOLERANCE, atol=TOLERANCE)
            want.append((moved.imag * weight).sum() / STEP)
            got.append((getattr(grads[path], array_name) * direction).sum())
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert min(np.abs(want)) > 0


def test_gradients_by_central_differences(rng: np.random.Generator) -> None:
    """The same in float64 alone, with nothing complex: one direction through all arrays at once."""
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend="numpy", dtype=np.float64)
    adapter = an_adapter(config, rng, dtype=np.float64, biases=True)
    net.attach(adapter)
    ids, labels = a_batch(rng, config)
    _, grads = net.loss(ids, labels, SEQS, weight=1.0)
    assert grads is not None
    slope, ends, h = 0.0, [], 1e-5
    directions = {
        (p, n): rng.standard_normal(a.shape)
        for p, x in adapter.items()
        for n, a in arrays(x).items()
    }
    for (path, name), direction in directions.items():
        slope += float((getattr(grads[path], name) * direction).sum())
    for move in (h, -2 * h):
        for (path, name), direction in directions.items():
            array = getattr(adapter[path], name)
            array += move * direction
        ends.append(float(net.loss(ids, labels, SEQS, grads=False)[0].sum()))
    # Truncation is of order h², rounding of order u / h: both below 1e-8 of a slope of this size.
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-7)


def test_a_model_without_an_adapter_has_no_gradients(rng: np.random.Generator) -> None:
    net = Llama.random(LlamaConfig.tiny(), backend="numpy")
    ids, labels = a_batch(rng, net.config)
    nll, grads = net.loss(ids, labels, SEQS)
    assert grads == {} and nll.shape == (M,)
    logits, cache = net.forward(ids, SEQS)
    assert net.backward(logits, cache) == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zero_b_is_the_base_model_bit_for_bit(
    ops: Any, rng: np.random.Generator, name: str
) -> None:
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend=ops)
    ids, labels = a_batch(rng, config)
    base = ops.to_numpy(net.forward(ids, SEQS)[0]).tobytes()
    base_nll = net.loss(ids, labels, SEQS)[0].tobytes()
    net.attach(an_adapter(config, rng, zero_b=True))
    assert ops.to_numpy(net.forward(ids, SEQS)[0]).tobytes() == base
    assert net.loss(ids, labels, SEQS)[0].tobytes() == base_nll
    net.attach(an_adapter(config, rng))
    assert ops.to_numpy(net.forward(ids, SEQS)[0]).tobytes() != base
    net.detach()
    assert net.adapter is None
    assert ops.to_numpy(net.forward(ids, SEQS)[0]).tobytes() == base


def test_training_leaves_the_weights_and_inputs_alone(ops: Any, rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny(**ARCHITECTURES["qwen3"])
    weights = random_weights(config, 2)
    asked: list[str] = []

    def source(name: str) -> np.ndarray:
        asked.append(name)
        array = weights(name)
        array.flags.writeable = False
        return array

    net = Llama(config, source, backend=ops)
    assert sorted(asked) == sorted(config.tensors())
    net.attach(an_adapter(config, rng, biases=True))
    ids, labels = a_batch(rng, config)
    for array in (ids, labels):
        array.flags.writeable = False
    net.loss(ids, labels, SEQS)
    for path, module in net.modules.items():
        name = "model.embed_tokens" if path == "lm_head" else path
        raw = weights(f"{name}.weight")
        assert ops.to_numpy(ops.unpack(module.W)).tobytes() == raw.tobytes()
    assert net.norm.w.tobytes() == weights("model.norm.weight").tobytes()


def test_tied_embeddings_share_one_weight_and_no_adapter(
    ops: Any, rng: np.random.Generator
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    head, embedding = net.lm_head.W, net.embed_tokens.W
    assert head is embedding or np.shares_memory(head, embedding)
    ids = np.arange(9)
    embedded = ops.to_numpy(net.embed_tokens.forward(ids)[0]).tobytes()
    x = rng.standard_normal((4, config.hidden_size)).astype(np.float32)
    projected = ops.to_numpy(net.lm_head.forward(x)[0]).tobytes()
    net.attach(an_adapter(config, rng, only=("lm_head",)))
    assert ops.to_numpy(net.embed_tokens.forward(ids)[0]).tobytes() == embedded
    assert ops.to_numpy(net.lm_head.forward(x)[0]).tobytes() != projected
    net.attach(an_adapter(config, rng, only=("embed_tokens",)))
    assert ops.to_numpy(net.embed_tokens.forward(ids)[0]).tobytes() != embedded
    assert ops.to_numpy(net.lm_head.forward(x)[0]).tobytes() == projected


def test_inputs_are_checked(ops: Any) -> None:
    net = Llama.random(LlamaConfig.tiny(), backend=ops)
    with pytest.raises(DataError, match=r"ids\[1\] is 61, outside the vocabulary 0 .. 60"):
        net.forward([0, 61])
    with pytest.raises(DataError, match=r"labels\[0\] is -1"):
        net.loss([0, 1], [-1, 2])
    with pytest.raises(DtypeError, match="float64"):
        net.forward([0.5])
    with pytest.raises(ShapeError, match="one flat row"):
        net.forward([[1, 2]])
    with pytest.raises(ShapeError, match="1 labels for 2 ids"):
        net.loss([1, 2], [3])
    with pytest.raises(ShapeError, match="weight has shape"):
        net.loss([1, 2], [3, 4], weight=[1.0])
    for lengths in ([1], [3]):
        with pytest.raises(ShapeError, match="Seqs.of"):
            net.forward([1, 2], Seqs.of(lengths))
    for rows in ([2], [-1], [[0]], 0):
        with pytest.raises(ShapeError, match="numbers from 0 to 1"):
            net.forward([1, 2], rows=rows)
    with pytest.raises(DtypeError, match="whole numbers"):
        net.forward([1, 2], rows=[0.7])
    logits, cache = net.forward([1, 2, 3], rows=[0, 2])
    with pytest.raises(ShapeError, match=r"dlogits has shape \[1, 61\], expected \[2, 61\]"):
        net.backward(logits[:1], cache)
    elsewhere = Seqs(np.array([0, 2]), np.array([1]), np.array([2]))
    with pytest.raises(ShapeError, match="Seqs.of"):
        net.forward([1, 2], elsewhere)
    with pytest.raises(ConfigError, match=r"129 tokens.*max_position_embeddings \(128\)"):
        net.forward([1] * 129)
    with pytest.raises(ConfigError, match=r"max_position_embeddings \(128\)"):
        net.kv_cache(1, 129)
    with pytest.raises(ConfigError, match="slots and capacity"):
        net.kv_cache(0, 5)
    kv = net.kv_cache(2, 5)
    for lengths, slots in (([1], None), ([1, 1], [0, 0]), ([1, 1], [0, 2]), ([1, 0], None)):
        with pytest.raises(ShapeError):
            net.decode([1] * sum(lengths), kv, lengths, slots)
    with pytest.raises(ShapeError, match="3 ids for lengths that add up to 2"):
        net.decode([1, 2, 3], kv, [1, 1])
    assert not kv.length.any()


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    config = LlamaConfig.tiny()
    weights = random_weights(config)
    for bad in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        with pytest.raises(ShapeError, match=rf"'{bad}' has shape \[1\]"):
            Llama(config, lambda n, bad=bad: np.ones(1, np.float32) if n == bad else weights(n))


def test_the_c_backend_refuses_what_it_would_round() -> None:
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    with pytest.raises(DtypeError, match="float64"):
        Llama.random(LlamaConfig.tiny(), backend="c", dtype=np.float64)


def test_a_model_keeps_no_array_that_it_was_given(rng: np.random.Generator) -> None:
    """So that the file that the arrays are views of can be closed once everything is packed."""
    if "c" not in backends.available():
        pytest.skip("the C core is not built; packing is a view on the numpy backend")
    config = LlamaConfig.tiny(**ARCHITECTURES["llama-biases"])
    weights = random_weights(config)
    given: list[weakref.ref[np.ndarray]] = []

    def source(name: str) -> np.ndarray:
        assert all(r() is None for r in given[:-1]), "an earlier tensor is still alive"
        array = weights(name)
        given.append(weakref.ref(array))
        return array

    net = Llama(config, source, backend="c")
    assert len(given) == len(config.tensors())
    assert all(r() is None for r in given)
    assert net.config is config


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_bf16_model_keeps_the_equalities(rng: np.random.Generator, name: str) -> None:
    """Rows without neighbours, decoding, recomputation and zero-init: bit for bit, as in fp32."""
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend="c", precision="bf16")
    ids, labels = a_batch(rng, config)
    base = net.forward(ids, SEQS)[0].tobytes()
    net.attach(an_adapter(config, rng, zero_b=True))
    assert net.forward(ids, SEQS)[0].tobytes() == base
    net.attach(an_adapter(config, rng, biases=True, dropout=0.2))
    whole = net.forward(ids, SEQS)[0]
    assert whole.dtype == np.float32 and whole.tobytes() != base
    kv, at = net.kv_cache(1, 12), 0
    for n in LENGTHS:
        own = ids[at : at + n]
        assert net.forward(own)[0].tobytes() == whole[at : at + n].tobytes()
        kv.clear(0)
        for t in range(n):
            assert net.decode(own[t : t + 1], kv, [1])[0].tobytes() == whole[at + t].tobytes()
        at += n
    runs = []
    for recompute in (False, True):
        nll, grads = net.loss(ids, labels, SEQS, drop=DropKey(1, 2), recompute=recompute)
        assert grads is not None
        assert all(g.A.dtype == g.B.dtype == np.float32 for g in grads.values())
        runs.append((nll.tobytes(), bits(net.ops, grads)))
    assert runs[0] == runs[1]


def test_a_bf16_model_is_near_the_fp32_model(rng: np.random.Generator) -> None:
    """The same weights, rounded first, so that what differs is what activations are rounded to: a
    few roundings of 2^-8 each, which at random do not add up to a tenth of the whole."""
    if "c" not in backends.available():
        pytest.skip("the C core is not built")
    config = LlamaConfig.tiny()
    weights = random_weights(config)
    kept = {n: from_bf16(to_bf16(weights(n))) for n in config.tensors()}
    nets = [
        Llama(config, kept.__getitem__, backend=b, precision=p)
        for b, p in (("c", "bf16"), ("numpy", "bf16"), ("numpy", "fp32"))
    ]
    ids, labels = a_batch(rng, config)
    adapter, results = an_adapter(config, rng), []
    for net in nets:
        net.attach(adapter)
        nll, grads = net.loss(ids, labels, SEQS)
        assert grads is not None
        results.append((nll, grads))
    (nll, grads), (same, _), (want, right) = results
    assert same.tobytes() == want.tobytes()  # of bf16 NumPy has the weights, which are the same
    assert 0 < np.abs(nll - want).max() < 0.1 * want.max()
    for path, grad in right.items():
        for name in "AB":
            off = getattr(grads[path], name) - getattr(grad, name)
            assert np.linalg.norm(off) < 0.1 * np.linalg.norm(getattr(grad, name)), path
