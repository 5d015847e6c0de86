"""waiting: speaks while a block is long, says how far it is, and is silent otherwise."""

from __future__ import annotations

import threading

import pytest

from pylora.display.waiting import waiting


def test_a_long_block_is_heard_of_with_its_time_and_how_far_it_is() -> None:
    said: list[str] = []
    twice = threading.Semaphore(0)

    def say(line: str) -> None:
        said.append(line)
        twice.release()

    with waiting(say, "packing", every=0.001) as note:
        assert twice.acquire(timeout=60)
        note("3 of 7")
        assert twice.acquire(timeout=60) and twice.acquire(timeout=60)
    spoken = len(said)
    assert said[0].startswith("… packing, 0 s")
    assert said[-1].startswith("… packing, 3 of 7, ")
    assert not any(t.name.startswith("waiting") for t in threading.enumerate())
    assert len(said) == spoken, "nothing is said afterwards"


def test_a_short_block_is_silent() -> None:
    said: list[str] = []
    with waiting(said.append, "nothing"):
        pass
    assert said == []


def test_an_error_passes_through_and_ends_the_talk() -> None:
    with pytest.raises(ValueError, match="inside"):
        with waiting(lambda line: None, "failing", every=0.001):
            raise ValueError("inside")
    assert not any(t.name.startswith("waiting") for t in threading.enumerate())
