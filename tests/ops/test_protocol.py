"""What holds for every operation on every backend: it agrees with the float64 reference within
the derived bound, reads any layout, writes to no input, and gives a row the same bits always."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bounds
import numpy as np
import pytest
from gpu import host_side
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_table import TABLE, Op, in_float64, normal, take_row

from pylora.errors import PyloraError
from pylora.numbers.precision import BF16, widened
from pylora.reference import IGNORE, Reference
from pylora.types import AdamW, Attn, Drop, LoRA, Seqs

ON_GPU = True  # `ops` may be a GPU's backend
REFERENCE = Reference()
every_op = pytest.mark.parametrize("op", TABLE, ids=str)
every_op_by_rows = pytest.mark.parametrize("op", [op for op in TABLE if op.rows], ids=str)
stateless = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # `ops` is
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture
def ops(ops: Any) -> Any:
    """Operations called with NumPy arrays, wherever they compute."""
    return host_side(ops)


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def isas(ops: Any) -> Iterator[str | None]:
    """Each kernel table of the backend in turn, or once where it has none."""
    if not hasattr(ops, "isas"):
        yield None
        return
    before = ops.isa
    try:
        for name in ops.isas():
            ops.use_isa(name)
            yield name
    finally:
        ops.use_isa(before)


@contextmanager
def threads(ops: Any, n: int) -> Iterator[None]:
    """With n threads, where the backend has threads of its own."""
    if not hasattr(ops, "set_num_threads"):
        yield
        return
    before = ops.num_threads
    ops.set_num_threads(n)
    try:
        yield
    finally:
        ops.set_num_threads(before)


def same_bits(a: Any, b: Any, what: str) -> None:
    assert a.shape == b.shape and a.tobytes() == b.tobytes(), f"{what}: other bits"


@every_op
@stateless
@given(seed=seeds, m=st.sampled_from([1, 2, 5, 13, 70]))
def test_agrees_with_float64(ops: Any, op: Op, seed: int, m: int) -> None:
    inputs = op.make(generator(seed), m)
    want = op.run(REFERENCE, in_float64(inputs))
    limit = op.limit(ops, inputs)
    for isa in isas(ops):
        for n, (got, w, b) in enumerate(zip(op.run(ops, inputs), want, limit, strict=True)):
            assert got.dtype in (np.float32, BF16)
            bounds.assert_within(widened(got), w, b, f"{op.name} output {n} ({isa})")


@every_op
def test_no_tokens(ops: Any, op: Op, rng: np.random.Generator) -> None:
    inputs = op.make(rng, 0)
    for n, (got, want) in enumerate(
        zip(op.run(ops, inputs), op.run(REFERENCE, in_float64(inputs)), strict=True)
    ):
        assert got.shape == want.shape
        assert not widened(got).any(), f"output {n}: sums over no tokens are zero"


@every_op_by_rows
@stateless
@given(seed=seeds, m=st.sampled_from([2, 9, 40]))
def test_rows_do_not_depend_on_their_neighbours(ops: Any, op: Op, seed: int, m: int) -> None:
    if not ops.bitwise:
        pytest.skip(f"{ops.name}: a row's bits may depend on the number of rows")
    rng = generator(seed)
    inputs = op.make(rng, m)
    together = op.run(ops, inputs)
    i = int(rng.integers(m))
    alone = op.run(ops, take_row(op, inputs, i))
    for n in op.row_outputs:
        same_bits(alone[n][0], together[n][i], f"{op.name} output {n} row {i}")


@every_op
def test_threads_change_no_bits(ops: Any, op: Op, rng: np.random.Generator) -> None:
    inputs = op.make(rng, 150)
    results = []
    for n in (1, 2, 5):
        with threads(ops, n):
            results.append(op.run(ops, inputs))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            same_bits(a, b, op.name)


def _layouts(a: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The same numbers, lying differently in memory."""
    wide = np.empty(tuple(2 * n + 1 for n in a.shape), a.dtype)
    wide.view(np.uint8)[...] = 0xFF  # NaN
    every_other = wide[tuple(slice(1, None, 2) for _ in a.shape)]
    every_other[...] = a
    yield "every other element", every_other
    yield (
        "backwards",
        a[(slice(None, None, -1),) * a.ndim].copy()[(slice(None, None, -1),) * a.ndim],
    )
    yield "column-major", np.asfortranarray(a)
    raw = np.zeros(a.nbytes + 1, np.uint8)
    odd = raw[1:].view(a.dtype).reshape(a.shape)
    odd[...] = a
    yield "unaligned", odd


@every_op
def test_any_layout_gives_the_same_bits(ops: Any, op: Op, rng: np.random.Generator) -> None:
    inputs = op.make(rng, 6)
    want = op.run(ops, inputs)
    floats = [n for n, a in inputs.items() if getattr(a, "dtype", None) in (np.float32, BF16)]
    for name in floats:
        for layout, view in _layouts(inputs[name]):
            if name in op.given_away:
                continue
            got = op.run(ops, inputs | {name: view})
            for n, (a, b) in enumerate(zip(got, want)):
                what = f"{op.name} output {n}, {name} {layout}"
                if hasattr(ops, "isa"):
                    same_bits(a, b, what)
                else:  # NumPy's own loops differ with the strides, within the bound
                    bounds.assert_within(widened(a), widened(b), 2 * op.bound(inputs)[n], what)


@every_op
def test_inputs_are_never_written_to(ops: Any, op: Op, rng: np.random.Generator) -> None:
    inputs = op.make(rng, 6)
    arrays = {n: a for n, a in inputs.items() if isinstance(a, np.ndarray)}
    before = {n: a.tobytes() for n, a in arrays.items()}
    for a in arrays.values():
        a.flags.writeable = False
    results = op.run(ops, inputs)
    for n, a in arrays.items():
        assert a.tobytes() == before[n], f"{op.name} wrote to {n}"
        for r in results:
            assert op.name in ("dropout", "cast", "cast bf16") or not np.shares_memory(a, r), (
                f"a result is {n} itself"
            )


# ---- attention: what a row may see ------------------------------------------------------------


@stateless
@given(seed=seeds, length=st.integers(1, 70), window=st.sampled_from([0, 1, 7, 40]))
def test_attention_decoding_is_prefill(ops: Any, seed: int, length: int, window: int) -> None:
    """A query alone against the keys so far gets what it got in the prompt; in C, the same bits."""
    rng = generator(seed)
    attn = Attn(4, 2, 16, 0.25, window)
    q, k, v = (normal(rng, length, n) for n in (64, 32, 32))
    o, lse = ops.attention_forward(q, k, v, Seqs.of([length]), attn)
    if length > 1:  # no query below sees the last key
        k[-1], v[-1] = np.nan, np.nan
    for t in {0, length // 3, max(0, length - 2)}:
        one = Seqs(np.array([0, 1]), np.array([0]), np.array([t + 1]))
        o1, lse1 = ops.attention_forward(q[t : t + 1], k, v, one, attn)
        if hasattr(ops, "isa"):
            same_bits(o1[0], o[t], f"o of query {t}")
            same_bits(lse1[0], lse[t], f"lse of query {t}")
        else:
            bo, bl = bounds.attention_forward(q[t : t + 1], k, v, one, attn)
            bounds.assert_within(o1, o[t : t + 1], 2 * bo, f"o of query {t}")
            bounds.assert_within(lse1, lse[t : t + 1], 2 * bl, f"lse of query {t}")


def test_attention_sequences_do_not_see_each_other(ops: Any, rng: np.random.Generator) -> None:
    attn, lengths = Attn(6, 3, 8, 0.3), [40, 3, 33]
    q, do = normal(rng, 76, 48), normal(rng, 76, 48)
    k, v = normal(rng, 76, 24), normal(rng, 76, 24)

    def run(rows: slice, n: list[int]) -> tuple[Any, ...]:
        seqs = Seqs.of(n)
        part = [a[rows] for a in (do, q, k, v)]
        o, lse = ops.attention_forward(*part[1:], seqs, attn)
        return o, lse, *ops.attention_backward(*part, o, lse, seqs, attn)

    together, start = run(slice(0, 76), lengths), 0
    for n in lengths:
        for a, b in zip(run(slice(start, start + n), [n]), together):
            if ops.bitwise:
                same_bits(a, b[start : start + n], f"sequence of {n}")
            else:
                np.testing.assert_allclose(a, b[start : start + n], rtol=0, atol=2e-5)
        start += n


def test_attention_sliding_window_of_everything_is_no_window(
    ops: Any, rng: np.random.Generator
) -> None:
    q, k, v = normal(rng, 50, 32), normal(rng, 50, 16), normal(rng, 50, 16)
    for a, b in zip(
        *(ops.attention_forward(q, k, v, Seqs.of([50]), Attn(4, 2, 8, 0.3, w)) for w in (0, 50))
    ):
        same_bits(a, b, "window")


# ---- optimizer and random numbers -------------------------------------------------------------


@stateless
@given(seed=seeds, n=st.sampled_from([0, 1, 17, 1000]), step=st.integers(1, 5000))
def test_adamw(ops: Any, seed: int, n: int, step: int) -> None:
    rng = generator(seed)
    param, grad, m = (normal(rng, n) for _ in range(3))
    v = rng.random(n).astype(np.float32) * 1e-2
    o = AdamW(1e-3, step, weight_decay=0.1, grad_scale=0.7)
    want = [a.astype(np.float64) for a in (param, m, v)]
    limits = bounds.adamw_step(param, grad, m, v, o)
    REFERENCE.adamw_step(want[0], grad.astype(np.float64), want[1], want[2], o)
    for isa in isas(ops):
        got = [a.copy() for a in (param, m, v)]
        ops.adamw_step(got[0], grad, got[1], got[2], o)
        for name, g, w, b in zip(("param", "m", "v"), got, want, limits):
            bounds.assert_within(g, w, b, f"{name} ({isa})")


def test_adamw_decays_without_a_gradient(ops: Any) -> None:
    """Decay is decoupled: with no gradient, param shrinks by lr * weight_decay and m, v stay 0."""
    param, m, v = np.full(5, 2, np.float32), np.zeros(5, np.float32), np.zeros(5, np.float32)
    ops.adamw_step(param, np.zeros(5, np.float32), m, v, AdamW(0.5, 1, weight_decay=0.5))
    assert (param == 1.5).all() and not m.any() and not v.any()


def test_sum_squares(ops: Any, rng: np.random.Generator) -> None:
    for n in (0, 1, 9, 50_000):
        x = normal(rng, n)
        want = math.fsum(float(a) ** 2 for a in x)
        assert abs(ops.sum_squares(x) - want) <= bounds.sum_squares(x) + math.ulp(want)


def test_philox_known_answers(ops: Any) -> None:
    """The vectors that come with the authors' library (Random123, kat_vectors, philox4x32 10)."""
    assert [hex(w) for w in ops.philox(0, 0, 0, 4)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@stateless
@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    n=st.integers(0, 300),
)
def test_philox_is_the_same_on_every_backend(
    ops: Any, seed: int, stream: int, first: int, n: int
) -> None:
    for isa in isas(ops):
        got = ops.philox(seed, stream, first, n)
        assert (got == REFERENCE.philox(seed, stream, first, n)).all(), isa


def test_dropout_is_the_same_on_every_backend(ops: Any, rng: np.random.Generator) -> None:
    x = normal(rng, 9, 70)
    drop = Drop(0.3, 1, 2, row0=7)
    same_bits(ops.dropout(x, drop), REFERENCE.dropout(x, drop), "dropout")
    part = ops.dropout(x[4:], Drop(0.3, 1, 2, row0=11))
    same_bits(part, ops.dropout(x, drop)[4:], "a part of the batch")


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_ids_out_of_range(ops: Any, rng: np.random.Generator, bad: int) -> None:
    W, ids = ops.pack(normal(rng, 10, 4)), np.array([1, bad, 2])
    with pytest.raises(IndexError):
        ops.embedding_forward(ids, W)
    with pytest.raises(IndexError):
        ops.embedding_backward(ids, normal(rng, 3, 4), 10)


@pytest.mark.parametrize("bad", [-1, IGNORE + 1, 10])
def test_labels_out_of_range(ops: Any, rng: np.random.Generator, bad: int) -> None:
    logits, labels = normal(rng, 3, 10), np.array([1, bad, IGNORE])
    with pytest.raises(IndexError):
        ops.cross_entropy_forward(logits, labels)
    with pytest.raises(IndexError):
        one = np.ones(3, np.float32)
        ops.cross_entropy_backward(logits, labels, one, one)


@pytest.mark.parametrize("bad", [-1, 5])
def test_positions_out_of_range(ops: Any, rng: np.random.Generator, bad: int) -> None:
    table = np.ones((5, 2), np.float32)
    with pytest.raises(IndexError):
        ops.rope(normal(rng, 2, 8), table, table, np.array([0, bad]), 4)


def test_shapes_that_do_not_fit(ops: Any, rng: np.random.Generator) -> None:
    W = ops.pack(normal(rng, 5, 6))
    lora = LoRA(normal(rng, 2, 6), normal(rng, 5, 2), 1.0)
    for x, adapter in [
        (normal(rng, 3, 7), None),
        (normal(rng, 3, 6), LoRA(lora.A[:, :5], lora.B, 1.0)),
        (normal(rng, 3, 6), LoRA(lora.A, lora.B[:, :1], 1.0)),
        (normal(rng, 3, 6), LoRA(lora.A, lora.B[:4], 1.0)),
    ]:
        with pytest.raises((PyloraError, ValueError)):
            ops.lora_forward(x, W, None, adapter)
    with pytest.raises((PyloraError, ValueError)):
        ops.swiglu_forward(normal(rng, 3, 6), normal(rng, 3, 5))
    with pytest.raises((PyloraError, ValueError)):
        ops.attention_forward(
            normal(rng, 3, 8),
            normal(rng, 3, 8),
            normal(rng, 2, 8),
            Seqs.of([3]),
            Attn(2, 2, 4, 1.0),
        )


@pytest.mark.parametrize("scale", [0, -0.5, math.nan, math.inf])
def test_attention_has_a_positive_scale(scale: float) -> None:
    with pytest.raises(PyloraError, match="attention's scale must be a positive finite number"):
        Attn(2, 1, 4, scale)
