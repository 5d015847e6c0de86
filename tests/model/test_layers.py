"""The layers against plain formulas written out here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from bounds import gamma

from pylora import backends
from pylora.errors import PlanError, ShapeError
from pylora.model.attention import Attention, positions
from pylora.model.block import Block
from pylora.model.config import LlamaConfig
from pylora.model.embedding import Embedding
from pylora.model.linear import DropKey, Grads, LoRALinear
from pylora.model.mlp import MLP
from pylora.model.rope import Rope, inverse_frequencies
from pylora.model.weights import random_weights
from pylora.types import LoRA, Seqs

# The formulas here are chains of fewer than 2^13 float64 roundings of numbers of size about one.
TOLERANCE = gamma(2**13, np.float64)
F64 = {"rtol": TOLERANCE, "atol": TOLERANCE}
STEP = 1e-30  # of a complex step: its square vanishes, so the slope is exact up to rounding
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN3 = {"model_type": "qwen3", "qk_norm": True, "head_dim": 8}


def numpy_ops() -> Any:
    return backends.get("numpy")


# ---- linear ------------------------------------------------------------------------------------


def a_lora(
    rng: np.random.Generator, d: int, k: int, r: int = 3, *, biases: bool = False, **more: Any
) -> LoRA:
    b = (rng.standard_normal(d), rng.standard_normal(d)) if biases else (None, None)
    A, B = rng.standard_normal((r, k)), rng.standard_normal((d, r))
    return LoRA(A, B, 0.75, bias=b[0], base_bias=b[1], **more)


def f32(lora: LoRA) -> LoRA:
    arrays = {n: getattr(lora, n) for n in ("A", "B", "bias", "base_bias")}
    cast = {n: a if a is None else a.astype(np.float32) for n, a in arrays.items()}
    return dataclasses.replace(lora, **cast)


@pytest.mark.parametrize("biases", [False, True])
def test_lora_linear_is_its_formula(rng: np.random.Generator, biases: bool) -> None:
    m, d, k = 5, 7, 4
    W, bias, lora = rng.standard_normal((d, k)), rng.standard_normal(d), a_lora(rng, d, k)
    lora = a_lora(rng, d, k, biases=biases)
    layer = LoRALinear("some.path", W, bias, ops=numpy_ops())
    x, dy, res = (rng.standard_normal(s) for s in ((m, k), (m, d), (m, d)))
    y, _ = layer.forward(x)
    np.testing.assert_allclose(y, x @ W.T + bias, **F64)
    layer.lora = lora
    y, cache = layer.forward(x, residual=res)
    base = lora.base_bias if biases else bias
    own = lora.bias if biases else 0
    want = res + x @ W.T + base + 0.75 * (x @ lora.A.T @ lora.B.T + own)
    np.testing.assert_allclose(y, want, **F64)

    grads: Grads = {}
    add = rng.standard_normal((m, k))
    dx = layer.backward(dy, cache, grads, add=add.copy())
    np.testing.assert_allclose(dx, add + dy @ (W + 0.75 * lora.B @ lora.A), **F64)
    once = grads["some.path"]
    np.testing.assert_allclose(once.B, 0.75 * dy.T @ (x @ lora.A.T), **F64)
    np.testing.assert_allclose(once.A, 0.75 * (dy @ lora.B).T @ x, **F64)
    if biases:
        np.testing.assert_allclose(once.bias, 0.75 * dy.sum(0), **F64)
        np.testing.assert_allclose(once.base_bias, dy.sum(0), **F64)
    else:
        assert once.bias is None and once.base_bias is None
    first = {n: v.copy() for n, v in vars(once).items() if v is not None}
    assert layer.backward(dy, cache, grads, need_dx=False) is None
    for name, value in first.items():  # a second backward adds
        np.testing.assert_array_equal(getattr(grads["some.path"], name), 2 * value)


def test_without_an_adapter_nothing_is_kept_and_no_gradient_made(rng: np.random.Generator) -> None:
    layer = LoRALinear("p", rng.standard_normal((3, 2)), ops=numpy_ops())
    x, grads = rng.standard_normal((4, 2)), dict[str, Any]()
    y, cache = layer.forward(x)
    assert cache.x is None and cache.h is None
    dx = layer.backward(y, cache, grads)
    assert grads == {} and dx is not None
    assert layer.backward(y, cache, grads, need_dx=False) is None


def test_zero_b_is_the_base_bit_for_bit(ops: Any, rng: np.random.Generator) -> None:
    W = rng.standard_normal((37, 19)).astype(np.float32)
    W[0] = 0.0  # gives results of -0.0, which adding 0.0 would lose
    x = -np.abs(rng.standard_normal((6, 19))).astype(np.float32)
    layer = LoRALinear("p", W, ops=ops)
    base, _ = layer.forward(x)
    base = base.copy()
    zero = np.zeros(37, np.float32)
    A = rng.standard_normal((4, 19)).astype(np.float32)
    layer.lora = LoRA(A, np.zeros((37, 4), np.float32), 2.0, bias=zero)
    y, _ = layer.forward(x)
    assert y.tobytes() == base.tobytes()


def test_inputs_of_any_layout_are_read_and_never_written(
    ops: Any, rng: np.random.Generator
) -> None:
    d, k, m = 9, 6, 5
    lora = f32(a_lora(rng, d, k, biases=True))
    wide = {
        "W": rng.standard_normal((d, 2 * k)),
        "x": rng.standard_normal((2 * m, k)),
        "dy": rng.standard_normal((d, m)),
    }
    wide = {n: a.astype(np.float32) for n, a in wide.items()}
    views = {"W": wide["W"][:, ::2], "x": wide["x"][::-2], "dy": wide["dy"].T}
    for a in (*wide.values(), lora.A, lora.B, lora.bias, lora.base_bias):
        a.flags.writeable = False
    for a in views.values():
        a.flags.writeable = False
    results = []
    for copy in (False, True):
        W, x, dy = (np.ascontiguousarray(v) if copy else v for v in views.values())
        layer = LoRALinear("p", W, ops=ops)
        layer.lora = lora
        y, cache = layer.forward(x)
        grads: Grads = {}
        dx = layer.backward(dy, cache, grads)
        g = grads["p"]
        results.append([ops.to_numpy(a).tobytes() for a in (y, dx, g.A, g.B, g.bias, g.base_bias)])
    assert results[0] == results[1]


def test_shapes_that_do_not_fit_are_named(rng: np.random.Generator) -> None:
    ops = numpy_ops()
    layer = LoRALinear("some.path", rng.standard_normal((3, 2)), ops=ops)
    with pytest.raises(ShapeError, match=r"some\.path.*\(4, 3\).*\[m, 2\]"):
        layer.forward(np.zeros((4, 3)))
    with pytest.raises(ShapeError, match=r"some\.path: bias"):
        LoRALinear("some.path", np.zeros((3, 2)), np.zeros(2), ops=ops)
    good = a_lora(rng, 3, 2)
    for change in (
        {"A": np.zeros((3, 3))},
        {"A": np.zeros(3)},
        {"B": np.zeros((3, 4))},
        {"bias": np.zeros(2)},
        {"base_bias": np.zeros((3, 1))},
    ):
        with pytest.raises(PlanError, match=rf"some\.path: {next(iter(change))} has shape"):
            layer.lora = dataclasses.replace(good, **change)
    assert layer.lora is None
    embedding = Embedding("e", np.zeros((5, 3)), ops=ops)
    with pytest.raises(PlanError, match="e: an embedding has no bias"):
        embedding.lora = a_lora(rng, 3, 5, biases=True)
    with pytest.raises(PlanError, match="e: A"):
        embedding.lora = a_lora(rng, 5, 3)


def test_rank_zero_and_no_rows_are_ordinary(ops: Any) -> None:
    layer = LoRALinear("p", np.ones((3, 2), np.float32), ops=ops)
    layer.lora = LoRA(np.zeros((0, 2), np.float32), np.zeros((3, 0), np.float32), 1.0)
    y, _ = layer.forward(np.ones((1, 2), np.float32))
    assert y.tolist() == [[2, 2, 2]]
    layer.lora = LoRA(np.ones((1, 2), np.float32), np.ones((3, 1), np.float32), 1.0)
    y, cache = layer.forward(np.ones((0, 2), np.float32))
    grads: Grads = {}
    dx = layer.backward(y, cache, grads)
    assert y.shape == (0, 3) and dx is not None and dx.shape == (0, 2)
    assert not grads["p"].A.any() and not grads["p"].B.any()


def test_dropout_is_keyed_by_module_step_and_row(ops: Any, rng: np.random.Generator) -> None:
    W = np.zeros((3, 64), np.float32)
    x = rng.standard_normal((8, 64)).astype(np.float32)
    lora = f32(a_lora(rng, 3, 64, dropout=0.5))

    def run(path: str, key: DropKey, rows: slice = slice(None)) -> bytes:
        layer = LoRALinear(path, W, ops=ops)
        layer.lora = lora
        return bytes(ops.to_numpy(layer.forward(x[rows], drop=key)[0]).tobytes())

    whole = run("a", DropKey(1, 5))
    assert run("a", DropKey(1, 5)) == whole
    halves = run("a", DropKey(1, 5), slice(0, 3)) + run("a", DropKey(1, 5, 3), slice(3, None))
    assert halves == whole
    others = [run("b", DropKey(1, 5)), run("a", DropKey(2, 5)), run("a", DropKey(1, 6))]
    assert len({whole, *others}) == 4
    assert DropKey(1, 5).of("a", dataclasses.replace(lora, dropout=0.0)) is None


# ---- embedding ---------------------------------------------------------------------------------


def test_an_embedding_is_a_linear_layer_of_one_hot_rows(rng: np.random.Generator) -> None:
    vocab, hidden, ids = 11, 5, np.array([3, 0, 3, 10])
    W, dy = rng.standard_normal((vocab, hidden)), rng.standard_normal((4, hidden))
    lora = dataclasses.replace(a_lora(rng, hidden, vocab), bias=rng.standard_normal(hidden))
    embedding = Embedding("e", W, ops=numpy_ops())
    linear = LoRALinear("e", np.ascontiguousarray(W.T), ops=numpy_ops())
    embedding.lora = linear.lora = lora
    got, want = dict[str, Any](), dict[str, Any]()
    y, cache = embedding.forward(ids)
    y_linear, linear_cache = linear.forward(np.eye(vocab)[ids])
    np.testing.assert_allclose(y, y_linear, **F64)
    embedding.backward(dy, cache, got)
    linear.backward(dy, linear_cache, want, need_dx=False)
    for name in ("A", "B", "bias"):
        np.testing.assert_allclose(getattr(got["e"], name), getattr(want["e"], name), **F64)


@pytest.mark.parametrize("zero", ["A", "B"])
def test_an_embedding_with_zero_a_or_b_is_the_base(
    ops: Any, rng: np.random.Generator, zero: str
) -> None:
    W = rng.standard_normal((11, 5)).astype(np.float32)
    W[3] = -0.0
    embedding = Embedding("e", W.copy(), ops=ops)
    A = rng.standard_normal((2, 11)).astype(np.float32) * (zero != "A")
    B = rng.standard_normal((5, 2)).astype(np.float32) * (zero != "B")
    embedding.lora = LoRA(A, B, 1.0, bias=np.zeros(5, np.float32))
    y, _ = embedding.forward(np.array([3, 1]))
    assert ops.to_numpy(y).tobytes() == W[[3, 1]].tobytes()


# ---- attention, feed-forward, block ------------------------------------------------------------


def dense_attention(config: LlamaConfig, w: Any, x: np.ndarray, layer: int = 0) -> np.ndarray:
    """Attention of one sequence by masks and whole matrices, one head at a time."""
    p, n, D = f"model.layers.{layer}.self_attn", len(x), config.head_dim
    frequency = inverse_frequencies(D, config.rope_theta, config.rope_scaling)
    angle = np.arange(n)[:, None] * np.concatenate([frequency, frequency])

    def heads(name: str, turned: bool) -> np.ndarray:
        y = x @ w(f"{p}.{name}_proj.weight").T
        if config.attention_bias:
            y = y + w(f"{p}.{name}_proj.bias")
        y = y.reshape(n, -1, D)
        if not turned:
            return y
        if config.qk_norm:
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + config.rms_norm_eps)
            y = y * w(f"{p}.{name}_norm.weight")
        half = np.concatenate([-y[..., D // 2 :], y[..., : D // 2]], -1)
        return y * np.cos(angle)[:, None] + half * np.sin(angle)[:, None]

    q, k, v = heads("q", True), heads("k", True), heads("v", False)
    i, j = np.arange(n)[:, None], np.arange(n)
    hidden = j > i
    if config.window(layer):
        hidden = hidden | (j <= i - config.window(layer))
    out = []
    group = config.num_attention_heads // config.num_key_value_heads
    for h in range(config.num_attention_heads):
        S = np.where(hidden, -np.inf, q[:, h] @ k[:, h // group].T / math.sqrt(D))
        P = np.exp(S - S.max(1, keepdims=True))
        out.append(P / P.sum(1, keepdims=True) @ v[:, h // group])
    return np.concatenate(out, -1) @ w(f"{p}.o_proj.weight").T


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"rope_scaling": LLAMA3, "num_key_value_heads": 4},
        {"model_type": "mistral", "sliding_window": 3},
        {"model_type": "qwen2", "attention_bias": True, "num_key_value_heads": 1},
        QWEN3,
    ],
)
def test_attention_is_its_formula(rng: np.random.Generator, over: dict[str, Any]) -> None:
    config = LlamaConfig.tiny(**over)
    w = random_weights(config, 3, np.float64)
    attention = Attention(config, 0, w, Rope(config, np.float64, ops=numpy_ops()), ops=numpy_ops())
    x = rng.standard_normal((9, config.hidden_size))
    y, _ = attention.forward(x, Seqs.of([4, 5]))
    want = [dense_attention(config, w, part) for part in (x[:4], x[4:])]
    np.testing.assert_allclose(y, np.concatenate(want), **F64)


def test_the_window_starts_at_its_layer(rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny(
        model_type="qwen2", attention_bias=True, sliding_window=2, max_window_layers=1
    )
    assert [config.window(i) for i in range(2)] == [0, 2]
    w = random_weights(config, 3, np.float64)
    x = rng.standard_normal((6, config.hidden_size))
    for layer in range(2):
        rope = Rope(config, np.float64, ops=numpy_ops())
        y, _ = Attention(config, layer, w, rope, ops=numpy_ops()).forward(x, Seqs.of([6]))
        np.testing.assert_allclose(y, dense_attention(config, w, x, layer), **F64)


def test_a_block_is_its_formula(rng: np.random.Generator) -> None:
    config = LlamaConfig.tiny(mlp_bias=True)
    w = random_weights(config, 4, np.float64)
    block = Block(config, 1, w, Rope(config, np.float64, ops=numpy_ops()), ops=numpy_ops())
    x = rng.standard_normal((5, config.hidden_size))
    p = "model.layers.1"

    def norm(a: np.ndarray, name: str) -> np.ndarray:
        rms = np.sqrt((a**2).mean(-1, keepdims=True) + config.rms_norm_eps)
        return np.asarray(a / rms * w(f"{p}.{name}.weight"))

    def linear(a: np.ndarray, name: str) -> np.ndarray:
        return np.asarray(a @ w(f"{p}.mlp.{name}.weight").T + w(f"{p}.mlp.{name}.bias"))

    mid = x + dense_attention(config, w, norm(x, "input_layernorm"), 1)
    n = norm(mid, "post_attention_layernorm")
    gate = linear(n, "gate_proj")
    product = gate / (1 + np.exp(-gate)) * linear(n, "up_proj")
    want = mid + linear(product, "down_proj")
    y, _ = block.forward(x, Seqs.of([5]))
    np.testing.assert_allclose(y, want, **F64)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_part_can_be_trained_by_itself(rng: np.random.Generator, part: str) -> None:
    """Its cache keeps the input, so that it needs no block around it. Slopes by complex step."""
    config = LlamaConfig.tiny(**QWEN3)
    w, ops = random_weights(config, 5, np.float64), numpy_ops()
    layer: Any = MLP(config, 0, w, ops=ops)
    args: tuple[Any, ...] = ()
    if part == "attention":
        layer = Attention(config, 0, w, Rope(config, np.float64, ops=ops), ops=ops)
        args = (Seqs.of([2, 4]),)
    for linear in layer.linears:
        linear.lora = a_lora(rng, linear.d, linear.k)
    x, dy = (rng.standard_normal((6, config.hidden_size)) for _ in range(2))
    _, cache = layer.forward(x, *args)
    grads: Grads = {}
    dx = layer.backward(dy, cache, grads)

    def slope(x: np.ndarray) -> float:
        return float((layer.forward(x.astype(complex), *args)[0].imag * dy).sum() / STEP)

    direction = rng.standard_normal(x.shape)
    got = [(dx * direction).sum()]
    want = [slope(x + STEP * 1j * direction)]
    for linear in layer.linears:
        real = linear.lora
        for name in "AB":
            direction = rng.standard_normal(getattr(real, name).shape)
            moved = getattr(real, name) + STEP * 1j * direction
            linear.lora = dataclasses.replace(real, **{name: moved})
            got.append((getattr(grads[linear.path], name) * direction).sum())
            want.append(slope(x))
        linear.lora = real
    size = max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=size * TOLERANCE)


def test_positions_count_from_the_start_of_each_sequence() -> None:
    assert positions(Seqs.of([3, 0, 2])).tolist() == [0, 1, 2, 0, 1]
    i64 = np.int64
    later = Seqs(np.array([0, 2, 3], i64), np.array([0, 10], i64), np.array([5, 1], i64))
    assert positions(later).tolist() == [3, 4, 0]
