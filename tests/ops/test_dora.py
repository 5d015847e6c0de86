"""DoRA on every backend: lengths, forward, backward and what must hold bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gpu import host_side

from pylora.conformance.bounds.ops import gamma
from pylora.numbers.lengths import row_squares
from pylora.ops.dora import factor
from pylora.reference import Reference
from pylora.types import Drop, LoRA

ON_GPU = True  # `ops` may be a GPU's backend
U = 2.0**-24
EXACT = Reference()
DROP = Drop(0.4, 5, 6, 3)
ANY_DROP = pytest.mark.parametrize("drop", [None, DROP], ids=["", "dropout"])


@pytest.fixture
def ops(ops: Any) -> Any:
    """Operations called with NumPy arrays, wherever they compute."""
    return host_side(ops)


def some(seed: int, *shape: int, size: float = 1.0) -> np.ndarray:
    return (size * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def made(seed: int, d: int, k: int, r: int, B: float = 0.3) -> tuple[np.ndarray, LoRA]:
    """W and an adapter with magnitudes of both signs, some of them zero."""
    m = some(seed + 3, d, size=k**0.5)
    m[::7] = 0
    low = LoRA(some(seed + 1, r, k), some(seed + 2, d, r, size=B), 1.7, magnitude=m)
    return some(seed, d, k), low


def plain_norms(W: np.ndarray, lora: LoRA) -> np.ndarray:
    V = W.astype(np.float64) + lora.scale * (lora.B.astype(np.float64) @ lora.A.astype(np.float64))
    return np.sqrt((V * V).sum(axis=1))


def wide(lora: LoRA) -> LoRA:
    arrays = {n: getattr(lora, n) for n in ("A", "B", "magnitude", "norm")}
    return replace(
        lora,
        scale=float(np.float32(lora.scale)),
        **{n: None if a is None else a.astype(np.float64) for n, a in arrays.items()},
    )


# ---- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7, 2), (64, 96, 8), (33, 16, 40), (1, 300, 3), (130, 1, 1)])
def test_lengths_are_within_the_bound_that_is_derived(
    ops: Any, shape: tuple[int, int, int]
) -> None:
    d, k, r = shape
    for seed, size in ((0, 0.01), (1, 0.3), (2, 30.0)):
        W, lora = made(seed, d, k, r, size)
        got = np.asarray(ops.row_norms(ops.pack(W), lora), np.float64)
        want = plain_norms(W, replace(lora, scale=float(np.float32(lora.scale))))
        assert (abs(got - want) <= (8 * gamma(k + r, "f32") + 2 * U) * want).all()


def test_lengths_of_rows_that_cancel_are_as_exact_as_others(ops: Any) -> None:
    """W + s B A is 2⁻²⁰, 2⁻⁹, … of W: what three terms of float32 products cannot tell."""
    d, k = 40, 64
    W = np.repeat(some(0, 1, k), d, axis=0)
    B = -(1 - 2.0 ** -np.arange(d).clip(0, 20)).astype(np.float32)[:, None]
    lora = LoRA(W[:1].copy(), B, 1.0)
    got = np.asarray(ops.row_norms(ops.pack(W), lora), np.float64)
    want = plain_norms(W, lora)
    assert (abs(got - want) <= (8 * gamma(k + 1, "f32") + 2 * U) * want).all()
    assert want.min() < 1e-5 * want.max()  # so it was worth asking


def test_lengths_of_columns_are_those_of_the_transposed_weight(ops: Any) -> None:
    W, lora = made(4, 24, 50, 3)
    got = ops.row_norms(ops.pack(np.ascontiguousarray(W.T)), lora, columns=True)
    want = plain_norms(W, replace(lora, scale=float(np.float32(lora.scale))))
    assert (abs(got - want) <= (8 * gamma(53, "f32") + 2 * U) * want).all()


def test_a_number_that_is_not_finite_shows_in_the_rows_that_it_reaches(ops: Any) -> None:
    W, lora = made(5, 6, 8, 2)
    W[1, 3], lora.B[4, 0] = np.nan, np.inf
    n = ops.row_norms(ops.pack(W), lora)
    assert np.isfinite(n).tolist() == [True, False, True, True, False, True]


def test_squares_of_rows_do_not_depend_on_the_rows_beside_them() -> None:
    W = some(6, 50, 700)
    assert (row_squares(W)[20:30] == row_squares(W[20:30])).all()
    assert np.allclose(row_squares(W), (W.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)


# ---- forward and backward ------------------------------------------------------------------------


def sizes(x: np.ndarray, W: np.ndarray, lora: LoRA, f: np.ndarray) -> np.ndarray:
    """The magnitudes of everything that a y adds up, for a bound."""
    X, A, B = (abs(a.astype(np.float64)) for a in (x, lora.A, lora.B))
    base = X @ abs(W.astype(np.float64)).T
    return (2 + 3 * abs(f)) * (base + abs(lora.scale) * (X @ A.T @ B.T))


@ANY_DROP
def test_forward_is_the_formula(ops: Any, drop: Drop | None) -> None:
    for seed, (m, d, k, r) in enumerate([(1, 5, 7, 2), (6, 40, 33, 4), (17, 3, 64, 8)]):
        W, lora = made(10 * seed, d, k, r)
        x, bias, rest = some(seed + 7, m, k), some(seed + 8, d), some(seed + 9, m, d)
        lora = replace(lora, norm=plain_norms(W, lora).astype(np.float32))
        y, h, v = ops.dora_forward(x, ops.pack(W), bias, lora, drop, rest)
        low, f = wide(lora), factor(wide(lora), np)
        dropped = EXACT.dropout(x, drop).astype(np.float64)
        want_v = dropped @ (W + low.scale * (low.B @ low.A)).T
        straight = (x.astype(np.float64) - dropped) @ W.astype(np.float64).T
        want = rest + straight + f * want_v + bias
        bound = gamma(k + r + 12, "f32") * (3 * sizes(x, W, low, f) + abs(rest) + abs(bias))
        assert (abs(y - want) <= bound).all()
        assert (abs(v - want_v) <= bound + gamma(k + r + 12, "f32") * sizes(x, W, low, f)).all()
        same, also_h = ops.lora_forward(x, ops.pack(W), bias, lora, drop, rest)
        assert (same == y).all() and (also_h == h).all()


@ANY_DROP
def test_gradients_are_those_of_finite_differences_with_the_lengths_held(drop: Drop | None) -> None:
    """In float64: y is linear in x, A, B and m each, so that a step of 1 will do."""
    W, lora = made(30, 6, 9, 3)
    W, lora, x = W.astype(np.float64), wide(lora), some(31, 5, 9).astype(np.float64)
    lora = replace(lora, norm=plain_norms(W, lora))
    dy = some(32, 5, 6).astype(np.float64)
    y, h, v = EXACT.dora_forward(x, W, None, lora, drop)
    dx, *rest = EXACT.dora_backward(dy, x, h, v, W, lora, drop)
    for name, grad in zip(("x", "A", "B", "magnitude"), (dx, *rest), strict=True):
        step = some(33, *grad.shape).astype(np.float64)
        moved_x = x + step if name == "x" else x
        moved = lora if name == "x" else replace(lora, **{name: getattr(lora, name) + step})
        ahead, _, _ = EXACT.dora_forward(moved_x, W, None, moved, drop)
        assert (dy * (ahead - y)).sum() == pytest.approx((grad * step).sum(), rel=1e-10)


@ANY_DROP
def test_gradients_agree_with_the_reference_in_float64(ops: Any, drop: Drop | None) -> None:
    for seed, (m, d, k, r) in enumerate([(1, 5, 7, 2), (9, 40, 33, 4)]):
        W, lora = made(40 + 10 * seed, d, k, r)
        lora = replace(lora, norm=plain_norms(W, lora).astype(np.float32))
        x, dy, add = some(seed + 47, m, k), some(seed + 48, m, d), some(seed + 49, m, k)
        _, h, v = ops.dora_forward(x, ops.pack(W), None, lora, drop)
        got = ops.dora_backward(dy, x, h, v, ops.pack(W), lora, drop, add=add.copy())
        low, X, D = wide(lora), x.astype(np.float64), dy.astype(np.float64)
        _, h64, v64 = EXACT.dora_forward(X, W.astype(np.float64), None, low, drop)
        want = EXACT.dora_backward(D, X, h64, v64, W.astype(np.float64), low, drop, add=add * 1.0)
        for a, b in zip(got, want, strict=True):
            assert abs(a - b).max() <= 40 * gamma(m + d + k + r, "f32") * abs(b).max()


def test_a_row_of_zeros_has_a_factor_of_one_and_no_gradient_of_its_length(ops: Any) -> None:
    """PEFT divides 0 by 0 there."""
    W, lora = made(50, 4, 6, 2)
    W[2], lora.B[2], lora.magnitude[2] = 0, 0, 0  # type: ignore[index]
    low = replace(lora, norm=ops.row_norms(ops.pack(W), lora))
    x = some(51, 3, 6)
    y, h, v = ops.dora_forward(x, ops.pack(W), None, low)
    assert (y[:, 2] == 0).all() and np.isfinite(y).all()
    _, _, _, dm = ops.dora_backward(some(52, 3, 4), x, h, v, ops.pack(W), low)
    assert dm[2] == 0 and np.isfinite(dm).all()


# ---- bit for bit ---------------------------------------------------------------------------------


@ANY_DROP
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_a_fresh_adapter_gives_the_bases_bits(ops: Any, precision: str, drop: Drop | None) -> None:
    if ops.name == "cuda" and precision in ("int8", "int4"):
        pytest.skip("a GPU does not compute in int8 and int4")
    for seed, (m, d, k) in enumerate([(1, 33, 32), (5, 64, 96)]):
        W, lora = made(60 + seed, d, k, 4, 0.0)
        P = ops.pack(W, precision)
        lora = replace(lora, magnitude=ops.row_norms(P, lora))
        x, bias, rest = some(seed, m, k), some(seed + 1, d), some(seed + 2, m, d)
        x[0, :3] = -0.0
        want, _ = ops.lora_forward(x, P, bias, None, None, rest)
        y, _ = ops.lora_forward(x, P, bias, lora, drop, rest)
        assert y.tobytes() == want.tobytes()


def test_a_row_has_the_bits_that_it_has_alone(ops: Any) -> None:
    if not ops.bitwise:
        pytest.skip("this backend does not promise bits")
    W, lora = made(70, 70, 96, 5)
    for precision in ("fp32", "bf16", "int8"):
        P = ops.pack(W, precision)
        low, x, bias = replace(lora, norm=ops.row_norms(P, lora)), some(71, 19, 96), some(72, 70)
        y, _ = ops.lora_forward(x, P, bias, low)
        for i in (0, 7, 18):
            one, _ = ops.lora_forward(x[i : i + 1], P, bias, low)
            assert one.tobytes() == y[i : i + 1].tobytes()
        v, _, _ = ops.dora_forward(x, P, bias, low)
        assert v.tobytes() == y.tobytes()


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_merging_rescales_and_unmerging_gives_every_bit_back(ops: Any, dtype: str) -> None:
    W, lora = made(80, 31, 40, 3)
    stored = W.astype({"f32": np.float32, "f16": np.float16, "bf16": np.float32}[dtype])
    if dtype == "bf16":
        stored = (W.view(np.uint32) >> 16).astype(np.uint16)
        W = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "f16":
        W = stored.astype(np.float32)
    before = stored.tobytes()
    merged, residue = ops.merge(stored, lora, dtype)
    assert stored.tobytes() == before
    n = plain_norms(W, replace(lora, scale=float(np.float32(lora.scale))))
    V = W + np.float32(lora.scale).astype(np.float64) * (lora.B.astype(np.float64) @ lora.A)
    want = (lora.magnitude / n)[:, None] * V
    got = merged.astype(np.float64)
    if dtype == "bf16":
        got = (merged.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    unit = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    assert (abs(got - want) <= (unit + 4 * U) * abs(want) + 2.0**-25).all()
    back = ops.unmerge(merged, replace(lora, norm=None), residue, dtype)
    assert back.tobytes() == before
    again = stored.copy()
    ops.merge_in_place(again, lora, dtype)
    assert again.tobytes() == merged.tobytes()


def test_merging_a_fresh_adapter_changes_no_bit(ops: Any) -> None:
    W, lora = made(81, 9, 12, 2, 0.0)
    lora = replace(lora, magnitude=np.sqrt(row_squares(W)).astype(np.float32))
    merged, residue = ops.merge(W, lora)
    assert merged.tobytes() == W.tobytes() and residue.position.size == 0
