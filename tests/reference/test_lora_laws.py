"""What makes a low-rank update a low-rank update: laws that hold whatever the numbers are."""

from __future__ import annotations

from typing import Any

import bounds
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_table import normal

from pylora.reference import Reference
from pylora.types import Drop, LoRA

stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `ops` is
sizes = st.integers(1, 70)
ranks = st.sampled_from([1, 2, 8, 33])
cases = given(
    seed=st.integers(0, 2**32 - 1), m=st.sampled_from([1, 2, 9]), k=sizes, d=sizes, r=ranks
)


class Case:
    """x [m,k], W [d,k], dy [m,d] and an adapter; forward and backward on one backend."""

    def __init__(self, ops: Any, seed: int, m: int, k: int, d: int, r: int) -> None:
        self.ops, self.rng = ops, np.random.default_rng(seed)
        self.x, self.W, self.dy = (normal(self.rng, *s) for s in ((m, k), (d, k), (m, d)))
        self.lora = LoRA(normal(self.rng, r, k), normal(self.rng, d, r), 0.75)
        self.packed = ops.pack(self.W)

    def forward(self, lora: LoRA | None, drop: Drop | None = None) -> Any:
        return self.ops.lora_forward(self.x, self.packed, None, lora, drop)[0]

    def backward(self, lora: LoRA, h: Any = None) -> tuple[Any, Any, Any]:
        if h is None:
            h = self.ops.lora_forward(self.x, self.packed, None, lora)[1]
        return self.ops.lora_backward(self.dy, self.x, h, self.packed, lora)

    def limits(self, h: Any) -> tuple[Any, Any, Any]:
        """What rounding may do to dx, dA, dB, given h."""
        return bounds.lora_backward(self.dy, self.x, h, self.W, self.lora)

    def limit(self, lora: LoRA) -> Any:
        """What rounding may do to y."""
        return bounds.lora_forward(self.x, self.W, None, lora)[0]


@stateless
@cases
def test_zero_init_is_the_base_bit_for_bit(ops: Any, seed: int, **shape: int) -> None:
    c = Case(ops, seed, **shape)
    zero = LoRA(c.lora.A, np.zeros_like(c.lora.B), c.lora.scale)
    base = c.forward(None)
    assert c.forward(zero).tobytes() == base.tobytes()
    assert c.forward(zero, Drop(0.5, 1, 2)).tobytes() == base.tobytes()
    dx, dA, _ = c.backward(zero)
    plain = ops.lora_backward(c.dy, None, None, c.packed)[0]
    assert dx.tobytes() == plain.tobytes() and not dA.any()


@stateless
@cases
def test_linear_in_the_scale(ops: Any, seed: int, **shape: int) -> None:
    """y(3) - y(0) = 3 (y(1) - y(0)): each y is within its bound, and y(0)'s is below y(1)'s."""
    c = Case(ops, seed, **shape)
    base = c.forward(None).astype(np.float64)
    one, three = (LoRA(c.lora.A, c.lora.B, s) for s in (1.0, 3.0))
    delta, triple = c.forward(one) - base, c.forward(three) - base
    bounds.assert_within(triple, 3 * delta, 6 * c.limit(one) + c.limit(three))


@stateless
@cases
def test_padding_the_rank_with_zeros_changes_nothing(ops: Any, seed: int, **shape: int) -> None:
    c = Case(ops, seed, **shape)
    (r, k), d = c.lora.A.shape, c.lora.B.shape[0]
    A, B = np.zeros((r + 5, k), np.float32), np.zeros((d, r + 5), np.float32)
    A[:r], B[:, :r] = c.lora.A, c.lora.B
    padded = LoRA(A, B, c.lora.scale)
    bounds.assert_within(c.forward(padded), c.forward(c.lora), 2 * c.limit(c.lora))
    h = normal(c.rng, shape["m"], r)
    dx, dA, dB = c.backward(padded, np.pad(h, ((0, 0), (0, 5))))
    for got, want, limit in zip((dx, dA[:r], dB[:, :r]), c.backward(c.lora, h), c.limits(h)):
        bounds.assert_within(got, want, 2 * limit)
    assert not dA[r:].any() and not dB[:, r:].any()


@stateless
@cases
def test_concatenated_along_the_rank_is_the_sum(ops: Any, seed: int, **shape: int) -> None:
    """B1 A1 s1 + B2 A2 s2 is one adapter with [A1; A2] and [s1 B1, s2 B2]."""
    c = Case(ops, seed, **shape)
    other = LoRA(normal(c.rng, 3, shape["k"]), normal(c.rng, shape["d"], 3), 2.0)
    A = np.concatenate([c.lora.A, other.A])
    B = np.concatenate([np.float32(c.lora.scale) * c.lora.B, np.float32(2) * other.B], axis=1)
    both = LoRA(A, B, 1.0)
    base = c.forward(None).astype(np.float64)
    want = base + (c.forward(c.lora) - base) + (c.forward(other) - base)
    limit = c.limit(c.lora) + c.limit(other) + 2 * c.limit(both)
    bounds.assert_within(c.forward(both), want, limit)


@stateless
@cases
def test_gauge_change(ops: Any, seed: int, **shape: int) -> None:
    """(G A, B G^-1) is the same adapter, and its gradients turn with it: h to h G, dA to G^-T dA,
    dB to dB G. A permutation and powers of two are exact, so only the order of sums differs."""
    c = Case(ops, seed, **shape)
    r = shape["r"]
    order, power = c.rng.permutation(r), 2.0 ** c.rng.integers(-3, 4, size=r)
    g = power.astype(np.float32)
    turned = LoRA(c.lora.A[order] * g[:, None], c.lora.B[:, order] / g, c.lora.scale)
    bounds.assert_within(c.forward(turned), c.forward(c.lora), 2 * c.limit(c.lora))
    h = normal(c.rng, shape["m"], r)
    dx, dA, dB = c.backward(turned, h[:, order] * g)
    dx0, dA0, dB0 = c.backward(c.lora, h)
    limit_dx, limit_dA, limit_dB = c.limits(h)
    bounds.assert_within(dx, dx0, 2 * limit_dx)
    bounds.assert_within(dA * g[:, None], dA0[order], 2 * limit_dA[order])
    bounds.assert_within(dB / g, dB0[:, order], 2 * limit_dB[:, order])


@stateless
@cases
def test_merged_weight_gives_what_the_adapter_gives(ops: Any, seed: int, **shape: int) -> None:
    c = Case(ops, seed, **shape)
    merged, residue = ops.merge(c.W, c.lora)
    y = ops.lora_forward(c.x, ops.pack(merged))[0]
    bounds.assert_within(y, c.forward(c.lora), bounds.merged_forward(c.x, c.W, c.lora))
    assert ops.unmerge(merged, c.lora, residue).tobytes() == c.W.tobytes()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_merge_is_the_same_on_every_backend(ops: Any, rng: np.random.Generator, dtype: str) -> None:
    W = normal(rng, 40, 50, size=0.02)
    if dtype == "f16":
        W = W.astype(np.float16)
    if dtype == "bf16":
        W = (W.view(np.uint32) >> 16).astype(np.uint16)
    lora = LoRA(normal(rng, 60, 50), normal(rng, 40, 60, size=1e-3), 0.3)
    merged, residue = ops.merge(W, lora, dtype)
    want, want_residue = Reference().merge(W, lora, dtype)
    assert merged.tobytes() == want.tobytes()
    assert (residue.position == want_residue.position).all()
    assert (residue.bits == want_residue.bits).all()
    assert residue.position.size > 0  # else this shows nothing
    assert ops.unmerge(merged, lora, residue, dtype).tobytes() == W.tobytes()
