"""Weights in 8 and 4 bits: the bytes are ggml's, the values exact, products within a bound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from blocks import magnitudes, qtype, random_blocks, values
from bounds import gamma
from small_models import CONFIG, weights, write_gguf

from pylora import backends
from pylora.errors import BackendError, DtypeError, ShapeError
from pylora.formats import open_checkpoint
from pylora.formats.gguf import GGUFCheckpoint
from pylora.model.llama import Llama
from pylora.numbers.blocks import BLOCKS, row_bytes
from pylora.numbers.precision import Stored
from pylora.numbers.quantize import KINDS, dequantize, quantize
from pylora.types import LoRA

D, K = 70, 1280  # not a multiple of 32 outputs; more than one piece of a sum


def x_error(x: np.ndarray, steps: int) -> np.ndarray:
    """|x - scale * code|: half a step, and the rounding of the quotient of up to `steps` steps."""
    groups = np.abs(x.astype(np.float64)).reshape(len(x), -1, 32).max(axis=2)
    step = np.maximum(groups / steps * (1 + gamma(1)), 2.0**-126)
    return np.repeat(step * (0.5 + steps * gamma(1)), 32, axis=1)


def bound(x: np.ndarray, stored: Stored, steps: int = 32639) -> np.ndarray:
    """Of x Wᵀ: x is rounded, sums within a group are exact. Then float32: two roundings for each
    of the 32 groups of a piece (one where it is fused), one for each piece, and 8: the group's sum
    to float32, times its scale, plus the minimum's part, those of its other half, and the value
    that the oracle's W has."""
    size, E = magnitudes(stored), x_error(x, steps)
    pieces = -(-x.shape[1] // 1024)
    n = 2 * 32 + pieces + 8
    return E @ size.T + gamma(n) * ((np.abs(x) + E) @ size.T) + 2.0**-126


@pytest.fixture
def core() -> Iterator[Any]:
    """The compiled core, put back as it was."""
    try:
        ops = backends.get("c")
    except BackendError as error:
        pytest.skip(str(error))
    isa, threads = ops.isa, ops.num_threads
    yield ops
    ops.use_isa(isa)
    ops.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_values_are_ggmls(rng: np.random.Generator, core: Any, kind: str) -> None:
    W = rng.normal(size=(D, K)) * 10.0 ** rng.integers(-7, 4, size=(D, 1))
    W = W.astype(np.float32)
    W[3], W[4, :32], W[5, 7] = 0, 1.5, -0.0
    W[6, :64] = np.repeat(np.arange(-16, 16) / 2, 2)  # ties
    W[7, :32] = np.arange(32) * np.float32(1e-42)  # subnormal: a scale of 0
    stored = quantize(W, kind)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(np.delete(W, 7, axis=0), qtype(kind))
    assert np.array_equal(np.delete(stored.rows, 7, axis=0), theirs)
    assert not dequantize(stored)[7, :32].any()
    assert np.array_equal(dequantize(stored), values(stored))
    for precision, own in (("int8", "q8_0"), ("int4", "q4_1")):
        if own == kind:
            assert np.array_equal(core.unpack(core.pack(W, precision)), dequantize(stored))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_a_file_have_exactly_their_values(
    rng: np.random.Generator, ops: Any, kind: str
) -> None:
    """Scales may be anything that 16 bits can say, infinite and NaN too."""
    k = 3 * BLOCKS[kind][0]
    stored = Stored(kind, rng.integers(0, 256, (D, row_bytes(kind, k)), np.uint8), (D, k))
    expected = values(stored)
    assert kind == "mxfp4" or not np.isfinite(expected).all()
    assert np.array_equal(dequantize(stored), expected, equal_nan=True)
    for precision in ("int8", "int4", "int4a8"):
        P = ops.pack(stored, precision)
        assert np.array_equal(ops.unpack(P), expected, equal_nan=True)
        ids = rng.integers(0, D, 40)
        assert np.array_equal(ops.embedding_forward(ids, P), expected[ids], equal_nan=True)
        with np.errstate(all="ignore"):
            y = ops.lora_forward(np.ones((3, k), np.float32), P)[0]
        assert y.shape == (3, D)


@pytest.mark.parametrize("precision, steps", [("int8", 32639), ("int8a8", 127)])
@pytest.mark.parametrize("kind", BLOCKS)
def test_products_are_within_the_bound_and_rows_depend_on_nothing_else(
    rng: np.random.Generator, core: Any, kind: str, precision: str, steps: int
) -> None:
    stored = random_blocks(rng, kind, D, K)
    x = (rng.normal(size=(50, K)) * 10.0 ** rng.integers(-3, 4, (50, 1))).astype(np.float32)
    x[1], x[2, 32:64] = 0, 0
    x[3, :32] *= np.float32(1e30)
    exact = x.astype(np.float64) @ values(stored).astype(np.float64).T
    allowed, P = bound(x, stored, steps), core.pack(stored, precision)
    fused = None
    for isa in core.isas():
        core.use_isa(isa)
        core.set_num_threads(2)
        y, _ = core.lora_forward(x, P)
        assert (np.abs(y - exact) <= allowed).all(), isa
        assert not y[1].any()
        core.set_num_threads(1)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 11):
            assert np.array_equal(core.lora_forward(x[:m], P)[0], y[:m]), (isa, m)
            assert np.array_equal(core.lora_forward(x[-m:], P)[0], y[-m:]), (isa, m)
        if isa != "portable":  # whose multiply-add rounds twice
            fused = y if fused is None else fused
            assert np.array_equal(y, fused), isa


@pytest.mark.parametrize("kind", BLOCKS)
def test_forward_and_backward_with_an_adapter(
    rng: np.random.Generator, ops: Any, kind: str
) -> None:
    stored = random_blocks(rng, kind, D, K)
    W = values(stored).astype(np.float64)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    x, dy, lora = normal(9, K), normal(9, D), LoRA(normal(4, K), normal(D, 4), 0.5)
    P = ops.pack(stored, "int4")
    y, h = ops.lora_forward(x, P, None, lora)
    dx, dA, dB = ops.lora_backward(dy, x, h, P, lora)
    x, dy, A, B = (a.astype(np.float64) for a in (x, dy, lora.A, lora.B))
    low = np.abs(x) @ np.abs(A.T) @ np.abs(B.T)
    slack = gamma(K + 10)
    assert (np.abs(y - x @ W.T - 0.5 * x @ A.T @ B.T) <= bound(x, stored) + slack * low).all()
    terms = np.abs(dy) @ np.abs(W) + np.abs(dy) @ np.abs(B) @ np.abs(A)
    # the weight's value is float32 in the oracle, too: dy W is an ordinary float32 product
    assert (np.abs(dx - dy @ W - 0.5 * dy @ B @ A) <= gamma(D + 20) * terms).all()
    assert dA.shape == A.shape and dB.shape == B.shape


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_inputs(rng: np.random.Generator, core: Any, kind: str) -> None:
    """Not finite: the whole row is NaN. As large or small as float32 goes: within the bound."""
    stored = quantize(rng.normal(size=(33, 96)).astype(np.float32), kind)
    P = core.pack(stored, "int4")
    big, tiny = np.float32(3.4e38), np.float32(1e-45)
    x = rng.normal(size=(7, 96)).astype(np.float32)
    x[1, 40], x[2, 0], x[3, 95] = np.nan, np.inf, -np.inf
    x[4], x[5], x[6] = 0, tiny, 0
    x[6, 5] = big
    sizes = np.abs(values(stored)[:, 5])
    for isa in core.isas():
        core.use_isa(isa)
        y, _ = core.lora_forward(x, P)
        assert np.isnan(y[1:4]).all()
        assert np.isfinite(y[[0, 5]]).all() and not y[4].any()
        exact = x[6:].astype(np.float64) @ values(stored).astype(np.float64).T
        small = sizes < 0.9  # the product is a float32, too
        assert small.any() and (np.abs(y[6] - exact[0]) <= bound(x[6:], stored)[0])[small].all()
        assert (np.abs(y[5]) <= bound(x[5:6], stored)[0] + 96 * 1e-45 * 8).all()


def test_what_cannot_be_quantized_is_refused(ops: Any) -> None:
    W = np.zeros((4, 40), np.float32)
    with pytest.raises(ShapeError, match="groups of 32"):
        quantize(W, "q8_0")
    with pytest.raises(ShapeError, match="groups of 32"):
        ops.pack(W, "int8")
    with pytest.raises(DtypeError, match="q5_0"):
        quantize(W[:, :32].copy(), "q5_0")
    with pytest.raises(DtypeError, match="float64"):
        quantize(np.zeros((2, 32)), "q8_0")
    with pytest.raises(ShapeError, match=r"\[4, 34\]"):
        dequantize(Stored("q8_0", np.zeros((4, 33), np.uint8), (4, 32)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_is_not_finite_is_nan_as_a_whole(ops: Any, kind: str) -> None:
    W = np.ones((3, 64), np.float32)
    W[0, 5], W[1, 40], W[2, 0] = np.nan, np.inf, 3e38
    got = dequantize(quantize(W, kind))
    assert np.isnan(got[0, :32]).all() and not np.isfinite(got[1, 32:]).any()
    assert np.isfinite(got[0, 32:]).all() and np.isfinite(got[1, :32]).all()
    assert not np.isfinite(got[2, 0])
    if kind != "q4_0":
        unpacked = ops.unpack(ops.pack(W, "int8" if kind == "q8_0" else "int4"))
        assert np.array_equal(np.isnan(unpacked), np.isnan(got))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16"])
def test_a_checkpoint_gives_its_blocks(tmp_path: Path, kind: str) -> None:
    """q and k too, whose rows are in another order in the file."""
    write_gguf(tmp_path / "m.gguf", kind=kind)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        for name in checkpoint.names():
            stored = checkpoint.stored(name)
            if len(checkpoint.shape(name)) == 1:
                assert stored is None
                continue
            assert stored is not None and stored.kind == kind.lower()
            assert np.array_equal(dequantize(stored), checkpoint.load(name)), name


def test_a_model_takes_the_blocks_and_says_so(tmp_path: Path, ops: Any) -> None:
    ids = np.arange(9)
    matrices = 7 * CONFIG.num_hidden_layers + 1  # the head is tied
    for kind, precision, stored_as in (
        ("Q4_0", "int8", "q4_0"), ("Q8_0", "int4", "q8_0"), ("F32", "int4", "q4_1"),
        ("F16", "int8", "q8_0"), ("BF16", "bf16", "bf16"), ("Q4_1", "fp32", "f32"),
    ):  # fmt: skip
        write_gguf(tmp_path / "m.gguf", kind=kind)
        with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
            model = Llama.from_checkpoint(checkpoint, ops, precision)
        assert model.stored_as == {stored_as: matrices}, kind
        assert np.isfinite(model.forward(ids)[0]).all()


def with_one(path: Path, rng: np.random.Generator, kind: gguf.GGMLQuantizationType) -> str:
    """A Q4_1 model with one matrix of another kind, whose name is returned."""
    name = "model.layers.1.mlp.up_proj.weight"
    size = gguf.GGML_QUANT_SIZES[kind][1]
    rows = rng.integers(0, 100, (CONFIG.intermediate_size, size), np.uint8)
    rest = {n: w for n, w in weights(CONFIG).items() if n != name}
    write_gguf(
        path,
        tensors=rest,
        kind="Q4_1",
        more=lambda w: w.add_tensor("blk.1.ffn_up.weight", rows, raw_dtype=kind),
    )
    return name


def test_other_blocks_are_kept_in_8_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    """TQ2_0 in a model of 4 bits: decoded, then stored as Q8_0."""
    name = with_one(tmp_path / "m.gguf", rng, gguf.GGMLQuantizationType.TQ2_0)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert isinstance(checkpoint, GGUFCheckpoint) and checkpoint.stored(name) is None
    model = Llama.from_checkpoint(checkpoint, "numpy", "int4")
    assert model.stored_as == {"q4_1": 7 * CONFIG.num_hidden_layers, "q8_0": 1}
    kept = model.modules[name.removesuffix(".weight")].W.values
    assert np.array_equal(kept, dequantize(quantize(checkpoint.load(name), "q8_0")))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_k_quants_are_kept_as_they_are(
    tmp_path: Path, rng: np.random.Generator, ops: Any, precision: str
) -> None:
    name = with_one(tmp_path / "m.gguf", rng, gguf.GGMLQuantizationType.Q4_K)
    with open_checkpoint(tmp_path / "m.gguf") as checkpoint:
        model = Llama.from_checkpoint(checkpoint, ops, precision)
        assert model.stored_as == {"q4_1": 7 * CONFIG.num_hidden_layers, "q4_k": 1}
        kept = model.ops.unpack(model.modules[name.removesuffix(".weight")].W)
        assert np.array_equal(kept, checkpoint.load(name))
