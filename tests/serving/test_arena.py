"""Extents: none overlaps another, and what is in one is kept wherever it moves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.serving.arena import BLOCK, Arena, Extent, row_bytes

ROWS = 12 * BLOCK


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def net(request: pytest.FixtureRequest) -> Llama:
    return Llama.random(LlamaConfig.tiny(), seed=1, backend="c", precision=request.param)


def fill(arena: Arena, extent: Extent, mark: int) -> None:
    for i, array in enumerate(arena._arrays):
        array[extent.start : extent.end] = mark + i


def marks(arena: Arena, extent: Extent, rows: int) -> set[tuple[int, int]]:
    found = set()
    for i, array in enumerate(arena._arrays):
        some = np.unique(array[extent.start : extent.start + rows])
        found |= {(i, int(value) - i) for value in some}
    return found


OPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "give", "shrink", "extend", "move", "compact", "behind"]),
        st.integers(1, 70),
        st.integers(0, 9),
    ),
    max_size=25,
)


@given(OPS)
def test_extents_keep_what_is_theirs(net: Llama, ops: list[tuple[str, int, int]]) -> None:
    arena, have = Arena(net, ROWS + 3, 4), {}
    for mark, (what, rows, which) in enumerate(ops, 1):
        some = list(have)
        extent = some[which % len(some)] if some else None
        if what == "take":
            taken = arena.take(rows)
            free = ROWS - sum(e.size for e in have)
            assert taken is None or taken.size - BLOCK < rows <= taken.size
            if taken is not None:
                fill(arena, taken, 10 * mark)
                have[taken] = 10 * mark
            elif rows <= free:
                arena.compact()
                assert arena._bounds()[-2][1] == ROWS - free, "what is free is at the end"
        elif extent is None:
            continue
        elif what == "give":
            arena.give(extent)
            del have[extent]
        elif what == "shrink":
            arena.shrink(extent, rows)
        elif what == "extend":
            if arena.extend(extent, rows):
                assert extent.size >= rows
                fill(arena, extent, have[extent])
        elif what == "move":
            to = arena.take(max(rows, extent.size))
            if to is not None:
                arena.move(extent, to, extent.size)
                fill_rest = marks(arena, extent, 1)
                assert {m for _, m in fill_rest} == {have[extent]}
                fill(arena, extent, have[extent])
        else:
            arena.compact(extent if what == "behind" else None)
            if what == "behind":
                free = ROWS - sum(e.size for e in have)
                assert arena.extend(extent, extent.size + free)
                fill(arena, extent, have[extent])
        edges = sorted((e.start, e.end) for e in have)
        assert all(a[1] <= b[0] for a, b in zip(edges, edges[1:], strict=False))
        assert all(0 <= a and b <= ROWS for a, b in edges)
        for extent_, value in have.items():
            assert {m for _, m in marks(arena, extent_, extent_.size)} == {value}
    assert arena.used == sum(e.size for e in have)


def test_what_a_row_takes(net: Llama) -> None:
    c = net.config
    item = 2 if net.precision == "bf16" and net.activation_dtype is not None else 4
    assert row_bytes(net) == 2 * c.num_hidden_layers * c.kv_size * item
    arena = Arena(net, 32, 2)
    assert sum(a.nbytes for a in arena._arrays) == 32 * row_bytes(net)
