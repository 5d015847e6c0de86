"""The operations of a block around its projections: bit for bit those that they are made of, with
or without a norm, a rotation, adapters, dropout, biases and a residual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pylora.errors import DtypeError, PyloraError, RangeError, ShapeError
from pylora.numbers.precision import BF16, to_bf16
from pylora.ops.plain import Plain
from pylora.types import Drop, LoRA, Norm, Projection, Rotation

HIDDEN = 64
seeds = st.integers(0, 2**32 - 1)
precisions = st.sampled_from(["fp32", "bf16", "int8", "int4"])
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `ops` is


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def projection(ops: Any, rng: np.random.Generator, d: int, m: int, precision: str) -> Projection:
    lora, drop = None, None
    if rng.integers(4):
        r = int(rng.choice([1, 8, 33]))
        lora = LoRA(normal(rng, r, HIDDEN), normal(rng, d, r), 0.5)
        drop = None if rng.integers(3) else Drop(0.25, 1, 2, 3)
    W = ops.pack(normal(rng, d, HIDDEN), precision)
    bias = normal(rng, d) if rng.integers(2) else None
    return Projection(W, bias, lora, drop, normal(rng, m, d) if rng.integers(3) == 0 else None)


def block(ops: Any, seed: int, m: int, precision: str) -> tuple[Any, ...]:
    """(generator, x, norm or None, dtype of what feeds products)"""
    rng = np.random.default_rng(seed)
    dtype = ops.activation_dtype(precision)
    norm = Norm(normal(rng, HIDDEN), 1e-5) if rng.integers(4) else None
    x = normal(rng, m, HIDDEN)
    return rng, to_bf16(x) if dtype == BF16 and norm is None else x, norm, dtype


def supported(ops: Any, precision: str) -> str:
    return precision if ops.name == "c" else "fp32"


def same(got: Any, want: Any, what: str) -> None:
    if want is None:
        assert got is None, what
        return
    assert got.dtype == want.dtype and got.shape == want.shape, what
    assert got.tobytes() == want.tobytes(), f"{what}: other bits"


def same_pairs(got: Any, want: Any) -> None:
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        same(one[0], other[0], f"y of projection {i}")
        same(one[1], other[1], f"h of projection {i}")


def rotation_of(rng: np.random.Generator, m: int, head_dim: int) -> Rotation:
    tables = (normal(rng, m + 2, head_dim // 2) for _ in range(2))
    return Rotation(*tables, rng.integers(0, m + 2, m), head_dim)


@stateless
@given(
    seed=seeds,
    m=st.sampled_from([0, 1, 2, 37, 130]),
    precision=precisions,
    head_dim=st.sampled_from([2, 6, 32, 64, 80]),
    rotated=st.booleans(),
)
def test_q_k_and_v(
    ops: Any, seed: int, m: int, precision: str, head_dim: int, rotated: bool
) -> None:
    precision = supported(ops, precision)
    rng, x, norm, dtype = block(ops, seed, m, precision)
    sizes = 3 * head_dim, head_dim, head_dim
    projections = [projection(ops, rng, d, m, precision) for d in sizes]
    projections[2].dtype = dtype
    rotation = rotation_of(rng, m, head_dim) if rotated else None
    got, rstd = ops.qkv_forward(x, projections, norm, rotation, dtype)
    want, other = Plain.qkv_forward(ops, x, projections, norm, rotation, dtype)
    same_pairs(got, want)
    same(rstd, other, "rstd")


@stateless
@given(
    seed=seeds,
    m=st.sampled_from([0, 1, 2, 37, 130]),
    precision=precisions,
    inner=st.sampled_from([1, 32, 100, 290]),
)
def test_gate_and_up(ops: Any, seed: int, m: int, precision: str, inner: int) -> None:
    precision = supported(ops, precision)
    rng, x, norm, dtype = block(ops, seed, m, precision)
    projections = [projection(ops, rng, inner, m, precision) for _ in range(2)]
    for p in projections:
        p.dtype = dtype
    got, product, rstd = ops.gate_up_forward(x, projections, norm, dtype)
    want, alone, other = Plain.gate_up_forward(ops, x, projections, norm, dtype)
    same_pairs(got, want)
    same(product, alone, "product")
    same(rstd, other, "rstd")


def test_weights_of_several_formats(ops: Any, rng: np.random.Generator) -> None:
    if ops.name != "c":
        pytest.skip("one format here")
    x, norm = normal(rng, 5, HIDDEN), Norm(normal(rng, HIDDEN), 1e-5)
    kinds = "int8", "int4", "int8"
    qkv = [projection(ops, rng, 32, 5, kind) for kind in kinds]
    rotation = rotation_of(rng, 5, 32)
    got, _ = ops.qkv_forward(x, qkv, norm, rotation)
    same_pairs(got, Plain.qkv_forward(ops, x, qkv, norm, rotation)[0])
    got, product, _ = ops.gate_up_forward(x, qkv[:2], norm)
    same(product, Plain.gate_up_forward(ops, x, qkv[:2], norm)[1], "product")


def test_wrong_arguments_are_refused(ops: Any, rng: np.random.Generator) -> None:
    if ops.name != "c":
        pytest.skip("the operations it is made of say what is wrong")
    m = 3
    x, norm = normal(rng, m, HIDDEN), Norm(normal(rng, HIDDEN), 1e-5)
    qkv = [Projection(ops.pack(normal(rng, 32, HIDDEN))) for _ in range(3)]
    rotation = rotation_of(rng, m, 32)
    far = Rotation(rotation.cos, rotation.sin, np.array([0, 1, 99]), 32)
    with pytest.raises(RangeError):
        ops.qkv_forward(x, qkv, norm, far)
    with pytest.raises(ShapeError, match="position"):
        ops.qkv_forward(x[:2], qkv, norm, rotation)
    with pytest.raises(ShapeError, match="sin"):
        ops.qkv_forward(
            x, qkv, norm, Rotation(rotation.cos, rotation.sin[:2], rotation.position, 32)
        )
    with pytest.raises(ShapeError, match="w must"):
        ops.qkv_forward(x, qkv, Norm(normal(rng, 32), 1e-5), rotation)
    with pytest.raises(ShapeError, match="x must"):
        ops.gate_up_forward(x[:, :32], qkv[:2], norm)
    with pytest.raises(DtypeError, match="x"):
        ops.gate_up_forward(x.astype(np.float64), qkv[:2], norm)
    with pytest.raises(PyloraError):  # 32 outputs are no heads of 48
        ops.qkv_forward(x, qkv, norm, rotation_of(rng, m, 48))
