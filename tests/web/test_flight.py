"""A flight gives the first token out at once, those behind it together, an end without delay; and
the bell between the threads rings once for many."""

from __future__ import annotations

import asyncio
from typing import Any

from pylora.serving.request import Done, Request, Token, Usage
from pylora.web import flight
from pylora.web.bell import Bell

END = Done("length", Usage(1, 3, 0, 0.0, 0.0, 0.0, 0))


class Taken:
    """An engine that only remembers who listens."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def submit(self, request: Request, on_event: Any) -> Any:
        self.heard.append(on_event)
        return self

    def cancel(self) -> None:
        pass


async def _turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_the_first_token_at_once_those_behind_it_together_the_end_without_delay():
    async def go() -> None:
        engine = Taken()
        one = flight.Flight(engine, Bell(asyncio.get_running_loop()))
        one.submit([Request([1], 3), Request([1], 3)])
        say = engine.heard
        events = one.events(rest=3600.0)  # none of this is by the clock
        asked = asyncio.ensure_future(anext(events))
        await _turns()
        say[0](Token(7))
        assert await asked == [(0, Token(7))]
        asked = asyncio.ensure_future(anext(events))
        await _turns()
        say[0](Token(8))
        await _turns()
        assert not asked.done()
        say[1](Token(9))
        await _turns()
        assert not asked.done()
        say[0](END)
        assert await asked == [(0, Token(8)), (1, Token(9)), (0, END)]
        asked = asyncio.ensure_future(anext(events))
        say[1](END)
        assert await asked == [(1, END)]
        assert [found async for found in events] == []

    asyncio.run(go())


def test_with_patience_silence_is_told():
    async def go() -> None:
        engine = Taken()
        one = flight.Flight(engine, Bell(asyncio.get_running_loop()))
        one.submit([Request([1], 3)])
        events = one.events(patience=0.01)
        assert await anext(events) is None
        engine.heard[0](END)
        assert await anext(events) == [(0, END)]

    asyncio.run(go())


def test_the_bell_rings_once_for_many_and_again_for_those_who_come_later():
    rings, answered = [], []

    class Loop:
        def call_soon_threadsafe(self, call: Any) -> None:
            rings.append(call)

    bell = Bell(Loop())  # type: ignore[arg-type]
    for i in range(5):
        bell.ring(lambda i=i: answered.append(i))
    assert len(rings) == 1
    bell.ring(lambda: bell.ring(lambda: answered.append("later")))
    rings.pop()()
    assert answered[:5] == [0, 1, 2, 3, 4]
    for call in rings:
        call()
    assert answered[5:] == ["later"]


def test_a_bell_of_a_loop_that_has_ended_is_silent():
    loop = asyncio.new_event_loop()
    loop.close()
    Bell(loop).ring(lambda: None)
