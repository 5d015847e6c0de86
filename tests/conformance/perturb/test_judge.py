"""Verdicts: a sample of mutants of each kind is killed, what changes nothing is told apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.perturb import judge as judging
from pylora.conformance.perturb import native, python, triggers
from pylora.conformance.perturb.corpus import differs
from pylora.conformance.perturb.python import Mutant

METHODS = {"forward", "backward", "merge", "forward_mixed", "base"}
IDS = ("F2", "F12", "F17", "B2", "B14", "M2", "M10", "X4", "X11", "F9", "M5")
FORWARD = frozenset({"forward"})


@pytest.fixture(scope="module")
def reaches():
    """Of some laws: what the sample below is about."""
    needs = {id: frozenset(set(LAWS[id].needs) & METHODS) for id in IDS}
    named = frozenset({"lora_forward", "lora_backward", "_rows", "_delta", "merge", "forward"})
    return [judging.Reach(LAWS[id], needs[id], named | needs[id], i) for i, id in enumerate(IDS)]


def of(text, kind):
    (found,) = [m for m in triggers.mutants(kind) if m.text == text]
    return found


@pytest.mark.parametrize(
    "kind, text",
    [
        ("size", "forward with r > 1024: last tile is 0"),
        ("size", "backward with m > 65536: of result 2 last tile is 0"),
        ("size", "forward_mixed with rank > 64: another scale"),
        ("size", "merge with k > 4096: last tile is shifted"),
        ("dtype", "forward in float64: W is rounded to a narrower dtype"),
        ("dtype", "backward in bfloat16: of result 1 last element is doubled"),
        ("layout", "forward, A of a negative stride: read as if it were contiguous"),
        ("call", "merge every 5 calls: last element is 0"),
        ("value", "forward, scale below 1: another scale"),
        ("position", "forward_mixed: of result 0 the last row is its neighbour's"),
    ],
)
def test_it_is_killed(kind, text, reaches):
    verdict = judging.judge(of(text, kind), reaches)
    assert verdict.status == judging.KILLED, verdict


def test_a_sample_of_changes_in_the_source_is_killed(reaches):
    kinds = ("source: term dropped", "source: operands swapped")
    places = (" lora_forward: ", " lora_backward: ", " _delta: ")
    every = [m for m in python.mutants() if m.kind in kinds and any(p in m.text for p in places)]
    assert len(every) > 20
    few = [reach for reach in reaches if reach.law.id in ("F2", "B2", "M2")]
    found = [judging.judge(m, few) for m in triggers.sample(every, 8, 5)]
    assert {v.status for v in found} <= {judging.KILLED, judging.EQUIVALENT, judging.WITHIN}
    assert sum(v.status == judging.KILLED for v in found) >= 6


def test_what_changes_nothing_is_equivalent_and_what_is_as_good_is_within():
    class Same(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            return super().forward(x, W, A, B, scale * 1, bias)

    class Other(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            y = super().forward(x, W, A, B, scale, bias)
            return np.nextafter(y, y + 1) if x.dtype == np.float32 and scale > 100 else y

    class Wrong(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            return super().forward(x, W, A, B, scale if abs(scale) < 9 else 9.0, bias)

    assert differs(Same(), FORWARD, Correct()) == "same"
    assert differs(Other(), FORWARD, Correct()) in ("same", "within")
    assert differs(Wrong(), FORWARD, Correct()) == "beyond"


def test_a_mutant_that_hangs_or_cannot_be_made_is_killed(reaches, monkeypatch):
    class Hangs(Correct):
        def forward(self, x, W, A, B, scale, bias=None):
            while True:
                pass

    def broken():
        raise ValueError("no")

    monkeypatch.setattr(judging, "PATIENCE", 0.2)
    verdict = judging.judge(Mutant("h", "x", "hangs", Hangs, FORWARD), reaches)
    assert verdict.status == judging.KILLED
    assert judging.judge(Mutant("b", "x", "b", broken, FORWARD), reaches).law.startswith("cannot")


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_changes_of_the_c_reference(reaches, monkeypatch):
    # The tests may be those of an installed package, which has no C sources beside it.
    monkeypatch.setattr(native, "SOURCE", Path(__file__).parents[3] / "csrc")
    every = native.mutants()
    assert len(every) > 300
    right = Mutant("c", "native", "unchanged", native.unchanged, FORWARD, native.unchanged)
    assert judging.judge_apart(right, reaches[:1]).status == judging.EQUIVALENT
    wrong = [m for m in every if "lora->s * low" in m.text and "operator" in m.kind][:2]
    for mutant in wrong:
        assert judging.judge_apart(mutant, reaches).status == judging.KILLED
    dead = Mutant("d", "native", "dies", _dies, FORWARD)
    assert judging.judge_apart(dead, reaches).law == "falls dead"


def _dies():
    import os

    os._exit(3)
