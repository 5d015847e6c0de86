"""Batches: every example once, in an order that anyone can reproduce, and splitting is harmless."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.errors import ConfigError, DataError
from pylora.training.batching import assemble, batches, epoch_steps, label_count, shuffled
from pylora.training.examples import Example

lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=70)


@given(
    lengths_strategy,
    st.integers(0, 2**64 - 1),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
    st.integers(30, 80),
)
def test_each_example_once_within_the_limits(
    lengths: list[int],
    seed: int,
    epoch: int,
    batch_size: int,
    accumulation: int,
    packing: bool,
    max_tokens: int,
) -> None:
    steps = epoch_steps(
        lengths,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        accumulation=accumulation,
        packing=packing,
        max_tokens=max_tokens,
    )
    flat = [i for step in steps for micro in step for i in micro]
    assert sorted(flat) == list(range(len(lengths)))
    for step in steps:
        assert step and all(micro for micro in step)
        assert all(sum(lengths[i] for i in micro) <= max_tokens for micro in step)
    if packing:
        assert all(len(step) <= accumulation for step in steps)
        assert sum(len(step) < accumulation for step in steps) <= 1
    else:
        sizes = [sum(len(micro) for micro in step) for step in steps]
        assert len(sizes) == math.ceil(len(lengths) / batch_size)
        assert all(size == batch_size for size in sizes if size != min(sizes))


@given(lengths_strategy, st.integers(0, 99), st.integers(1, 9), st.integers(1, 12))
def test_accumulation_splits_a_step_without_changing_it(
    lengths: list[int], seed: int, batch_size: int, accumulation: int
) -> None:
    def flat(n: int) -> list[list[int]]:
        steps = epoch_steps(lengths, seed=seed, epoch=0, batch_size=batch_size, accumulation=n)
        return [[i for micro in step for i in micro] for step in steps]

    assert flat(accumulation) == flat(1)


def philox_block(seed: int, stream: int, block: int) -> list[int]:
    """Four words of Philox 4x32-10 in plain integers, as Salmon et al. (2011) print it."""
    low = 2**32 - 1
    c, k = [block & low, block >> 32, stream & low, stream >> 32], [seed & low, seed >> 32]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(q >> 32) ^ c[1] ^ k[0], q & low, (p >> 32) ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_the_order_is_that_of_the_documented_generator() -> None:
    stream = int.from_bytes(hashlib.sha256(b"shuffle/3").digest()[:8], "little")
    words = [w for block in range(10) for w in philox_block(2**40 + 7, stream, block)]
    keys = [words[2 * i] + (words[2 * i + 1] << 32) for i in range(20)]
    assert shuffled(20, seed=2**40 + 7, name="3") == sorted(range(20), key=keys.__getitem__)


def test_seeds_and_epochs_differ_and_repeat() -> None:
    lengths = [5] * 64
    orders = {
        (seed, epoch): tuple(epoch_steps(lengths, seed=seed, epoch=epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    assert orders[0, 1] == tuple(epoch_steps(lengths, seed=0, epoch=1))


def test_examples_of_a_step_are_alike_in_length(rng: Any) -> None:
    lengths = rng.integers(1, 200, size=256).tolist()
    steps = epoch_steps(lengths, seed=3, epoch=0, batch_size=8)
    spread = [np.ptp([lengths[i] for micro in step for i in micro]) for step in steps]
    assert np.mean(spread) < 200 / 8  # a random batch of 8 spreads over 7/9 of the range
    firsts = [min(lengths[i] for i in step[0]) for step in steps]
    assert firsts != sorted(firsts), "the steps themselves are not in order of length"


def test_packing_fills_the_micro_batches(rng: Any) -> None:
    lengths = rng.integers(1, 40, size=300).tolist()
    steps = epoch_steps(lengths, seed=0, epoch=0, packing=True, max_tokens=128)
    filled = [sum(lengths[i] for i in step[0]) for step in steps]
    # First fit leaves less than the shortest waiting example free; all but a few are nearly full.
    assert len(steps) <= math.ceil(sum(lengths) / 128) * 1.1
    assert np.median(filled) >= 120


def test_limits_that_cannot_be_kept() -> None:
    with pytest.raises(DataError, match="example 1 has 9 tokens, more than max_tokens 8"):
        epoch_steps([3, 9], seed=0, epoch=0, max_tokens=8)
    with pytest.raises(ConfigError, match="packing needs max_tokens"):
        epoch_steps([3, 9], seed=0, epoch=0, packing=True)


def test_batches_lie_one_behind_the_other_and_know_their_rows() -> None:
    examples = [Example.of(range(n + 1), [True] * (n + 1)) for n in (3, 1, 4)]
    whole = assemble(examples, (2, 0, 1))
    assert whole.ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert whole.labels.tolist() == [1, 2, 3, 4, 1, 2, 3, 1]
    assert whole.seqs.q_start.tolist() == [0, 4, 7, 8] and whole.seqs.k_len.tolist() == [4, 3, 1]
    parts = list(batches(examples, ((2,), (0, 1))))
    assert [b.row0 for b in parts] == [0, 4]
    assert np.concatenate([b.ids for b in parts]).tolist() == whole.ids.tolist()
    assert label_count(examples, ((2,), (0, 1))) == 8
