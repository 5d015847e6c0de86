"""Whose turn it is."""

from __future__ import annotations

from pylora.serving.adapters import Lease
from pylora.serving.request import Request
from pylora.serving.run import Run
from pylora.serving.waiting import Waiting


def a_run(number: int, key: str = "") -> Run:
    return Run(number, Request([1], 1, key=key), lambda _: None, Lease(None, None, ()), frozenset())


def test_keys_take_turns_and_the_oldest_of_a_key_is_first() -> None:
    waiting = Waiting()
    runs = [a_run(1, "a"), a_run(2, "a"), a_run(3, "b"), a_run(4, "a"), a_run(5, "c")]
    for run in runs:
        waiting.add(run)
    order = []
    while (run := waiting.next([])) is not None:
        waiting.remove(run)
        order.append(run.number)
    assert order == [1, 3, 5, 2, 4] and not len(waiting)


def test_who_has_more_in_work_waits() -> None:
    waiting, busy = Waiting(), [a_run(1, "a"), a_run(2, "a"), a_run(3, "b")]
    for run in (mine := a_run(4, "a")), (other := a_run(5, "b")), (new := a_run(6, "c")):
        waiting.add(run)
    assert waiting.next(busy) is new
    assert waiting.next(busy, {new}) is other
    assert waiting.next(busy, {new, other}) is mine
    assert waiting.next(busy, {new, other, mine}) is None and len(waiting) == 3


def test_who_gave_memory_up_is_first_the_oldest_of_them_before() -> None:
    waiting = Waiting()
    waiting.add(a_run(1))
    late, early = a_run(3), a_run(2)
    waiting.put_back(late)
    waiting.put_back(early)
    assert waiting.next([late]) is early and [run.number for run in waiting] == [2, 3, 1]
    waiting.remove(early)
    assert waiting.next([]) is late
