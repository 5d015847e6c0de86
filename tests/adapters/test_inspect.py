"""inspect: norms and singular values against a dense SVD, and known counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.adapters.inspect import count_parameters, inspect, numbers, singular_values
from pylora.types import LoRA


def lora(rng: np.random.Generator, d: int, k: int, r: int, scale: float = 2.0) -> LoRA:
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((r, k), (d, r)))
    return LoRA(A, B, scale)


@given(
    d=st.integers(1, 9),
    k=st.integers(1, 9),
    r=st.integers(1, 12),
    scale=st.floats(-4, 4).map(lambda s: round(s, 3)),
    seed=st.integers(0, 999),
)
def test_singular_values_are_those_of_the_dense_delta(
    d: int, k: int, r: int, scale: float, seed: int
) -> None:
    one = lora(np.random.default_rng(seed), d, k, r, scale)
    delta = scale * (one.B.astype(np.float64) @ one.A.astype(np.float64))
    dense = np.linalg.svd(delta, compute_uv=False)
    got = singular_values(one)
    n = min(d, k, r)
    assert got.shape == (n,)
    # QR, the small SVD and the dense one each err by a small multiple of eps times the norms.
    size = abs(scale) * float(np.linalg.norm(one.A)) * float(np.linalg.norm(one.B))
    bound = 64 * (d + k + r) * np.finfo(np.float64).eps * size
    np.testing.assert_allclose(got, dense[:n], rtol=0, atol=bound)
    assert np.all(dense[n:] <= bound)
    assert inspect({"m": one})[0].norm == pytest.approx(np.linalg.norm(delta), abs=bound)


def test_a_module_is_named_by_its_kind_and_layer(rng: np.random.Generator) -> None:
    adapter = {
        "model.layers.12.self_attn.q_proj": lora(rng, 6, 4, 2),
        "lm_head": LoRA(np.ones((2, 4), np.float32), np.zeros((9, 2), np.float32), 1.0),
    }
    q, head = inspect(adapter)
    assert (q.kind, q.layer, q.d, q.k, q.rank, q.scale) == ("q_proj", 12, 6, 4, 2, 2.0)
    assert 1 <= q.stable_rank <= 2
    assert (head.kind, head.layer, head.norm, head.stable_rank) == ("lm_head", None, 0, 0)


def test_parameter_counts_are_those_of_the_arrays(rng: np.random.Generator) -> None:
    one = lora(rng, 7, 5, 3)
    trainable, full = count_parameters(7, 5, 3)
    assert trainable == one.A.size + one.B.size
    assert full == (one.B @ one.A).size


def test_the_numbers_that_lora_is_known_by() -> None:
    rows = {(row.what, row.rank): (row.trainable, row.full) for row in numbers()}
    assert rows["4096 × 4096", 8] == (65_536, 16_777_216)
    assert [rows["1000 × 1000", r][0] for r in (4, 8, 16)] == [8_000, 16_000, 32_000]
    trainable, whole = next(v for (what, _), v in rows.items() if "whole model" in what)
    assert trainable == 32 * 2 * 8 * (4096 + 4096) == 4_194_304
    assert whole == 6_738_415_616  # the 7B Llama as published
