"""The whole model: gradients by complex step, and the equalities that must hold bit for bit."""

from __future__ import annotations

import dataclasses
import tracemalloc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from bounds import gamma
from small_models import STEP

from pylora import backends
from pylora.errors import (
    ConfigError,
    DataError,
    DtypeError,
    PlanError,
    PyloraError,
    ShapeError,
    UnsupportedError,
)
from pylora.model.config import LlamaConfig
from pylora.model.llama import IGNORE, DropKey, Grads, Llama
from pylora.model.weights import random_weights
from pylora.numbers.precision import from_bf16, to_bf16
from pylora.types import LoRA, Seqs

LENGTHS = [5, 1, 6]
SEQS = Seqs.of(LENGTHS)
M = sum(LENGTHS)
# The tiny model is a chain of fewer than 2^15 float64 roundings of numbers of size about one.
TOLERANCE = gamma(2**15, np.float64)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-biases": {
        "attention_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "num_key_value_heads": 4},
    "qwen3": {"model_type": "qwen3", "qk_norm": True, "head_dim": 8},
}


def an_adapter(
    config: LlamaConfig,
    rng: np.random.Generator,
    *,
    dtype: Any = np.float32,
    zero_b: bool = False,
    biases: bool = False,
    dropout: float = 0.0,
    only: tuple[str, ...] = (),
) -> dict[str, LoRA]:
    """An adapter on every module, or on those whose paths end with one of `only`."""
    out = {}
    for i, (path, spec) in enumerate(config.modules().items()):
        r = 1 + i % 3
        A = rng.standard_normal((r, spec.k)).astype(dtype) / 5
        B = rng.standard_normal((spec.d, r)).astype(dtype) / 5
        b = rng.standard_normal((2, spec.d)).astype(dtype) / 5
        lora = LoRA(A, np.zeros_like(B) if zero_b else B, 0.5 + i % 2, dropout)
        if biases:
            base = None if spec.kind == "embedding" else b[1].copy()
            lora = dataclasses.replace(lora, bias=b[0].copy(), base_bias=base)
        if not only or path.endswith(only):
            out[path] = lora
    return out


def a_batch(rng: np.random.Generator, config: LlamaConfig) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) with some labels not counted."""
    ids, labels = rng.integers(0, config.vocab_size, (2, M))
    labels[[0, 5, 7]] = IGNORE
    return ids, labels


def arrays(lora: LoRA) -> dict[str, np.ndarray]:
    named = {n: getattr(lora, n) for n in ("A", "B", "bias", "base_bias")}
    return {n: a for n, a in named.items() if a is not None}


def bits(ops: Any, grads: Grads) -> dict[str, bytes]:
    return {
        f"{path}.{n}": ops.to_numpy(a).tobytes()
        for path, g in grads.items()
        for n, a in vars(g).items()
        if a is not None
    }


def to_complex(adapter: Mapping[str, LoRA]) -> dict[str, LoRA]:
    return {
        path: dataclasses.replace(lora, **{n: a.astype(complex) for n, a in arrays(lora).items()})
        for path, lora in adapter.items()
    }


# ---- gradients --------------------------------------------------------------------------------


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


def test_backward_of_some_rows_is_that_of_all_with_zeros_elsewhere(
    rng: np.random.Generator,
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend="numpy", dtype=np.float64)
    net.attach(an_adapter(config, rng, dtype=np.float64))
    ids, _ = a_batch(rng, config)
    rows = np.array([8, 2, 8])  # a row may be asked for twice
    some, cache = net.forward(ids, SEQS, rows=rows)
    dlogits = rng.standard_normal(some.shape)
    got = net.backward(dlogits, cache)
    whole, cache = net.forward(ids, SEQS)
    scattered = np.zeros_like(whole)
    np.add.at(scattered, rows, dlogits)
    want = net.backward(scattered, cache)
    for path, grad in want.items():
        for name in "AB":
            array = getattr(grad, name)
            np.testing.assert_allclose(
                getattr(got[path], name), array, rtol=0, atol=TOLERANCE * np.abs(array).max()
            )


def test_a_model_without_an_adapter_has_no_gradients(rng: np.random.Generator) -> None:
    net = Llama.random(LlamaConfig.tiny(), backend="numpy")
    ids, labels = a_batch(rng, net.config)
    nll, grads = net.loss(ids, labels, SEQS)
    assert grads == {} and nll.shape == (M,)
    logits, cache = net.forward(ids, SEQS)
    assert net.backward(logits, cache) == {}


# ---- bit for bit ------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_does_not_depend_on_its_neighbours(
    ops: Any, rng: np.random.Generator, name: str
) -> None:
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, biases=True))
    lengths = [1, 17, 4, 30]
    ids = rng.integers(0, config.vocab_size, sum(lengths))
    whole = ops.to_numpy(net.forward(ids, Seqs.of(lengths))[0])
    at = 0
    for n in lengths:
        own = slice(at, at + n)
        assert ops.to_numpy(net.forward(ids[own])[0]).tobytes() == whole[own].tobytes()
        short = ops.to_numpy(net.forward(ids[at : at + (n + 1) // 2])[0])
        assert short.tobytes() == whole[at : at + (n + 1) // 2].tobytes()
        at += n
    rows = np.array([40, 3, 3])
    some = ops.to_numpy(net.forward(ids, Seqs.of(lengths), rows=rows)[0])
    assert some.tobytes() == whole[rows].tobytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_gives_the_bits_of_a_full_forward(
    ops: Any, rng: np.random.Generator, name: str
) -> None:
    """Prompts of several lengths, then single tokens, then a slot given to a new sequence."""
    config = LlamaConfig.tiny(**ARCHITECTURES[name])
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng))
    texts = [rng.integers(0, config.vocab_size, 12) for _ in range(4)]
    kv = net.kv_cache(3, 12)

    def last(text: np.ndarray) -> bytes:
        return bytes(ops.to_numpy(net.forward(text)[0])[-1].tobytes())

    def step(parts: list[np.ndarray], slots: list[int], seen: list[np.ndarray]) -> None:
        logits = net.decode(np.concatenate(parts), kv, [len(p) for p in parts], slots)
        assert [r.tobytes() for r in ops.to_numpy(logits)] == [last(s) for s in seen]

    a, b, c, d = texts
    step([a[:5], b[:1], c[:7]], [0, 1, 2], [a[:5], b[:1], c[:7]])
    step([c[7:8], a[5:6], b[1:4]], [2, 0, 1], [c[:8], a[:6], b[:4]])
    kv.clear(0)
    step([b[4:5], d[:9]], [1, 0], [b[:5], d[:9]])
    step([c[8:12]], [2], [c])
    assert kv.length.tolist() == [9, 5, 12]
    with pytest.raises(ConfigError, match="slot 2.*13 tokens.*capacity is 12"):
        net.decode([1], kv, [1], [2])
    assert kv.length.tolist() == [9, 5, 12]


def test_loss_by_chunks_is_the_loss_of_whole_logits(
    ops: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, biases=True))
    ids, labels = a_batch(rng, config)
    weight = rng.uniform(0.1, 1, M).astype(np.float32)
    logits, cache = net.forward(ids, SEQS)
    nll, lse = ops.cross_entropy_forward(logits, labels)
    want = net.backward(ops.cross_entropy_backward(logits, labels, lse, weight), cache)
    for size in (2, 1000):
        monkeypatch.setattr(ops, "head_rows", size)
        got_nll, got = net.loss(ids, labels, SEQS, weight=weight)
        assert got is not None and got_nll.tobytes() == nll.tobytes()
        for path, grad in want.items():
            for name, array in vars(grad).items():
                if array is not None:
                    # The sums run over the same rows, in another order and without the zero rows.
                    scale = float(np.abs(array).max())
                    np.testing.assert_allclose(
                        getattr(got[path], name), array, rtol=0, atol=gamma(2**9) * scale
                    )


def test_rows_without_a_label_count_nothing(ops: Any, rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng))
    ids, labels = a_batch(rng, config)
    counted = labels != IGNORE
    nll, grads = net.loss(ids, labels, SEQS)
    _, by_number = net.loss(ids, labels, SEQS, weight=1 / int(counted.sum()))
    assert grads is not None and by_number is not None
    assert not nll[~counted].any() and (nll[counted] > 0).all()
    assert bits(ops, grads) == bits(ops, by_number)
    nothing, zeros = net.loss(ids, np.full(M, IGNORE), SEQS)
    assert zeros is not None and set(zeros) == set(config.modules())
    assert not nothing.any()
    assert not any(a.any() for g in zeros.values() for a in (g.A, g.B))
    empty, none = net.loss([], [])
    assert empty.shape == (0,) and none is not None and set(none) == set(config.modules())


def test_head_dropout_is_keyed_by_row_whatever_is_counted(
    ops: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.tiny()
    net = Llama.random(config, backend=ops)
    net.attach(an_adapter(config, rng, only=("lm_head",), dropout=0.5))
    ids, labels = rng.integers(0, config.vocab_size, (2, M))
    key = DropKey(3, 1, row0=10)
    whole, _ = net.loss(ids, labels, SEQS, drop=key)
    monkeypatch.setattr(ops, "head_rows", 5)
    few = labels.copy()
    few[::2] = IGNORE
    some, _ = net.loss(ids, few, SEQS, drop=key)
    assert some[1::2].tobytes() == whole[1::2].tobytes()
    with pytest.raises(UnsupportedError, match="lm_head"):
        net.forward(ids, SEQS, drop=key, rows=[0])


# ---- frozen weights, attaching ----------------------------------------------------------------


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
    assert net.norm.tobytes() == weights("model.norm.weight").tobytes()


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


# ---- inputs that cannot be used ---------------------------------------------------------------


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


# ---- bfloat16 ---------------------------------------------------------------------------------


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


# ---- memory -----------------------------------------------------------------------------------


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
