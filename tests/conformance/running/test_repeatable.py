"""Examples do not hang on what the process has imported."""

from __future__ import annotations

import importlib
import sys

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from hypothesis import find, settings
from hypothesis import strategies as st

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.running import repeatable, runner


def examples(law):
    """What is drawn, as texts."""
    drawn = []

    class Watched(runner.Search):
        def example(self, problem):
            fields = {k: v for k, v in vars(problem).items() if not callable(v)}
            drawn.append(repr(fields))

    Watched(Correct(), LAWS[law]).run(150, 0, False)
    return drawn


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Imports a module of the caller's that is full of constants."""
    numbers = ", ".join(f"{n}, {n}.25, {n / 1024!r}" for n in range(1025, 9000, 97))
    (tmp_path / "mine.py").write_text(f"A = [{numbers}]\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: importlib.import_module("mine")
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("law", ["F12", "P1", "M3"])
def test_examples_are_those_of_the_seed_whatever_is_imported(law, module):
    before = examples(law)
    module()
    assert examples(law) == before and len(set(before)) > 50


def test_hypothesis_is_the_callers_again_afterwards():
    providers = pytest.importorskip("hypothesis.internal.conjecture.providers")
    if not hasattr(providers, "_get_local_constants"):
        pytest.skip("this hypothesis gathers no constants, or elsewhere")
    gather, cache = providers._get_local_constants, providers.CONSTANTS_CACHE
    with pytest.raises(KeyError), repeatable.nothing_gathered():
        with repeatable.nothing_gathered():
            assert len(providers._get_local_constants()) == 0
        assert providers._get_local_constants is not gather
        assert providers.CONSTANTS_CACHE is not cache
        raise KeyError
    assert providers._get_local_constants is gather and providers.CONSTANTS_CACHE is cache


def test_a_version_that_has_none_is_left_alone(monkeypatch):
    providers = pytest.importorskip("hypothesis.internal.conjecture.providers")
    monkeypatch.delattr(providers, "_get_local_constants", raising=False)
    with repeatable.nothing_gathered():
        assert not hasattr(providers, "_get_local_constants")
        assert find(st.just(1), bool, settings=settings(database=None)) == 1
