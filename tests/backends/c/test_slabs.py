"""Memory of packed weights: pieces do not overlap, and slabs live as long as a piece of theirs."""

from __future__ import annotations

import threading
import weakref

import numpy as np

from pylora.backends.c.slabs import SLAB, Slabs


def owner(piece: np.ndarray) -> np.ndarray:
    assert isinstance(piece.base, np.ndarray)
    return piece.base


def test_pieces_are_aligned_and_apart() -> None:
    slabs = Slabs()
    sizes = [1, 63, 64, 1 << 14, (1 << 14) + 1, 1 << 20, SLAB // 4, SLAB // 4 + 1, 100_001] * 5
    pieces = [slabs.take(n) for n in sizes]
    ends = 0
    spans = sorted((p.__array_interface__["data"][0], p.size) for p in pieces)
    assert sorted(size for _, size in spans) == sorted(sizes)
    for start, size in spans:
        assert start % 64 == 0
        assert start >= ends
        ends = start + size


def test_weights_share_a_slab_and_it_dies_with_the_last_of_them() -> None:
    slabs = Slabs()
    a, b = slabs.take(1 << 20), slabs.take(1 << 20)
    assert owner(a) is owner(b)
    slab = weakref.ref(owner(a))
    del a
    b[:] = 7
    assert slab() is not None
    del b
    assert slab() is None
    c = slabs.take(1 << 20)  # of a new one
    c[:] = 1
    assert owner(c).size >= SLAB


def test_threads_get_pieces_of_their_own() -> None:
    slabs, pieces = Slabs(), list[np.ndarray]()

    def work() -> None:
        for _ in range(200):
            pieces.append(slabs.take(1 << 15))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    starts = {p.__array_interface__["data"][0] for p in pieces}
    assert len(starts) == len(pieces) == 800
    assert all(abs(a - b) >= 1 << 15 for a, b in zip(sorted(starts), sorted(starts)[1:]))
