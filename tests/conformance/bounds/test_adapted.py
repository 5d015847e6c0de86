"""The bounds of biases and embeddings hold for other orders and other ways, and are not wide."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.bounds import adapted, layer
from pylora.conformance.problems.layers import elements


def test_a_bias_of_B_in_any_order(rng):
    x, W, A, B, more, bias = (
        rng.normal(size=s).astype(np.float32) for s in ((9, 40), (8, 40), (3, 40), (8, 3), 8, 8)
    )
    s = np.float32(1 / 3)
    exact = [a.astype(np.float64) for a in (x, W, A, B, more, bias)]
    want = exact[0] @ exact[1].T + exact[5] + (exact[0] @ exact[2].T @ exact[3].T + exact[4]) / 3
    bound = adapted.biased(x, W, [(A, B, more, 1 / 3)], bias)
    for y in (
        x @ W.T + bias + s * (x @ A.T @ B.T + more),
        (x @ A.T) @ (s * B).T + (s * more + bias) + x @ W.T,
        x @ (W + s * (B @ A)).T + bias + s * more,
    ):
        assert (np.abs(y - want) <= bound).all()
    assert (np.abs(x @ W.T + bias + s * (x @ A.T @ B.T) + more - want) > bound).all()
    assert (bound < 1e-3).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_token_that_comes_often_is_not_summed_in_16_bits(rng, dtype):
    n = 1000
    dy, B = (elements(rng, shape, "positive", dtype) for shape in ((n, 2), (2, 1)))
    A, ids = elements(rng, (1, 3), "positive", dtype), np.ones(n, np.int64)
    off, _ = adapted.embedding_backward(dy, ids, A, B, 1.0)
    want = (dy.astype(np.float64) @ B.astype(np.float64)).sum()
    right = np.asarray((dy.astype(np.float32) @ B.astype(np.float32)).sum()).astype(dy.dtype)
    total = np.zeros((), dy.dtype)
    for row in (dy.astype(np.float32) @ B.astype(np.float32))[:, 0].astype(dy.dtype):
        total = total + row
    assert abs(float(right) - want) <= off[0, 1] < abs(float(total) - want)
    assert off[0, 0] < 1e-4  # of a token that does not come nothing is allowed but underflow


def test_float16_says_nothing_where_something_may_overflow(rng):
    x, W = np.full((1, 2), 200, np.float16), np.full((2, 2), 100, np.float16)
    A, B = np.full((1, 2), 200, np.float16), np.full((2, 1), 2.0**-10, np.float16)
    assert np.isfinite(layer.forward(x, W, [])).all()
    assert np.isinf(layer.forward(x, W, [(A, B, 1.0)])).all()  # h is 80000
    assert np.isinf(layer.forward(x, 2 * W, [])).all()
    small = np.full((1, 2), 2.0**-20, np.float16)
    assert (layer.forward(small, W[:1] / 100, []) < 2.0**-20).all()
    assert np.isinf(layer.merged(np.full((1, 1), 65504, np.float16), A[:, :1], A[:, :1], 1.0)).all()


def test_no_rows_no_bound(rng):
    W = rng.normal(size=(4, 3)).astype(np.float32)
    assert adapted.without_adapter(np.zeros((0, 4), np.float32), W).shape == (0, 3)
    assert adapted.bias_gradient(np.zeros((0, 4), np.float32), 2.0).max() < 1e-37
