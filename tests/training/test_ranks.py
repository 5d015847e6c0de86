"""Sums of several processes in one order: threads play the processes, so that no MPI is needed."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import together

from pylora import backends
from pylora.errors import ConfigError
from pylora.model.linear import Grads, LoRAGrad, add_grad
from pylora.training.optimizer import trainable
from pylora.training.ranks import (
    ALONE,
    added,
    check_share,
    same_everywhere,
    shares,
    total_gradients,
)
from pylora.types import LoRA


@given(n=st.integers(0, 200), size=st.integers(1, 70))
def test_shares_are_a_partition_in_order_and_nearly_equal(n: int, size: int) -> None:
    got = shares(n, size)
    assert [i for share in got for i in share] == list(range(n))
    assert len(got) == size
    assert max(map(len, got)) - min(map(len, got)) <= 1


@settings(deadline=None, max_examples=25)
@given(
    micros=st.integers(1, 9),
    size=st.integers(2, 4),
    seed=st.integers(0, 2**32 - 1),
    absent=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=8),
)
def test_any_number_of_processes_has_the_bits_of_one(
    micros: int, size: int, seed: int, absent: set[tuple[int, int]]
) -> None:
    """Numbers of very different size, so that another order would be seen; -0.0 where only zeros
    are added; and gradients that some micro-batches do not have."""
    rng = np.random.default_rng(seed)
    shapes = {"a": ((2, 3), (4, 2)), "b": ((1, 5), (2, 1)), "c": ((3, 2), (2, 3))}
    like = {p: LoRA(np.zeros(a, np.float32), np.zeros(b, np.float32), 1.0)
            for p, (a, b) in shapes.items()}  # fmt: skip
    like["b"] = replace(like["b"], magnitude=np.ones(2, np.float32))  # DoRA has one array more

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape) * 10.0 ** rng.integers(-6, 7, shape)
        return np.where(rng.random(shape) < 0.2, -0.0, x).astype(np.float32)

    every: list[Grads] = [
        {
            p: LoRAGrad(draw(a), draw(b), magnitude=draw((2,)) if p == "b" else None)
            for j, (p, (a, b)) in enumerate(shapes.items())
            if (i, j) not in absent
        }
        for i in range(micros)
    ]
    alone: Grads = {}
    for grads in every:
        for path, grad in grads.items():
            add_grad(alone, path, deepcopy(grad))
    ops = backends.get("numpy")
    stretches = shares(micros, size)

    names = trainable(like)

    def work(ranks: Any) -> Grads:
        mine = [every[i] for i in stretches[ranks.rank]]
        return total_gradients(ranks, mine, [len(s) for s in stretches], names, ops)

    for got in together(size, work):
        assert got.keys() == alone.keys()
        for path in alone:
            assert got[path].A.tobytes() == alone[path].A.tobytes()
            assert got[path].B.tobytes() == alone[path].B.tobytes()
        if "b" in alone:
            assert got["b"].magnitude.tobytes() == alone["b"].magnitude.tobytes()


def test_another_order_would_be_seen() -> None:
    """What the test above would miss if addition did not care about the order."""
    big = np.array([1e8], np.float32)
    one = np.array([1.0], np.float32)
    assert added([big, one, -big]) != added([big, -big, one])


def test_more_processes_than_micro_batches() -> None:
    class Many:
        rank, size = 0, 4

    with pytest.raises(ConfigError, match=r"4 processes.*2 micro-batches.*--accumulation 4"):
        check_share(Many(), 2)  # type: ignore[arg-type]
    check_share(ALONE, 1)


def test_what_differs_is_named_on_every_rank() -> None:
    heard = []

    def work(ranks: Any) -> None:
        try:
            same_everywhere(ranks, {"data": "x" if ranks.rank < 2 else "y", "seed": 1})
        except ConfigError as error:
            heard.append(str(error))

    together(3, work)
    assert len(heard) == 3
    assert all("rank 2 of 3 has another data than rank 0" in said for said in heard)
