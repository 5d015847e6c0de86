"""Prefixes: found by their key and their tokens, forgotten from the oldest on."""

from __future__ import annotations

import numpy as np
import pytest

from pylora.model.config import LlamaConfig
from pylora.model.llama import Llama
from pylora.serving.arena import Arena
from pylora.serving.prefixes import Prefix, Prefixes, common


@pytest.fixture
def arena() -> Arena:
    return Arena(Llama.random(LlamaConfig.tiny(), backend="c"), 640, 2)


def add(prefixes: Prefixes, arena: Arena, key: str, ids: list[int]) -> Prefix:
    extent = arena.take(len(ids) + 40)
    assert extent is not None
    prefix = Prefix(key, np.array(ids), extent)
    prefixes.add(prefix)
    return prefix


def test_the_longest_of_the_same_key_is_found(arena: Arena) -> None:
    prefixes, ids = Prefixes(arena), list(range(40))
    short = add(prefixes, arena, "a", [*ids[:20], 99])
    long = add(prefixes, arena, "a", [*ids[:30], 98])
    other = add(prefixes, arena, "b", ids)
    assert prefixes.find("a", np.array(ids)) == (long, 30)
    assert prefixes.find("a", np.array(ids[:25])) == (long, 25)
    assert prefixes.find("b", np.array(ids)) == (other, 40)
    assert prefixes.find("c", np.array(ids)) == (None, 0)
    assert prefixes.find("a", np.array(ids[:15])) == (None, 0), "too short to be worth it"
    assert prefixes.find("a", np.array([5, *ids])) == (None, 0)
    assert prefixes.rows == arena.used == 32 + 32 + 48 and len(prefixes) == 3
    assert prefixes.drop_oldest(spared=short) and prefixes.find("b", np.array(ids))[1] == 40
    assert prefixes.drop_oldest() and not prefixes.find("a", np.array(ids))[1]
    assert prefixes.drop_oldest() and not prefixes.drop_oldest() and arena.used == 0


def test_what_another_one_has_is_not_kept_twice(arena: Arena) -> None:
    prefixes, ids = Prefixes(arena), list(range(60))
    add(prefixes, arena, "a", ids[:30])
    add(prefixes, arena, "a", ids[:50])
    assert len(prefixes) == 1 and prefixes.rows == arena.used == 64
    add(prefixes, arena, "a", ids[:40])
    assert len(prefixes) == 1 and prefixes.find("a", np.array(ids))[1] == 50
    add(prefixes, arena, "a", ids[:3])
    assert len(prefixes) == 1 and arena.used == 64


def test_what_two_have_in_common() -> None:
    some = np.array([1, 2, 3])
    assert common(some, np.array([1, 2, 4, 5])) == 2
    assert common(some, np.array([1, 2, 3, 4])) == common(some, some) == 3
    assert common(some, np.array([], np.int64)) == 0 and common(some, np.array([9])) == 0
