"""The kit kills every mutant, and lets the implementation that they are made from live."""

from __future__ import annotations

import os
import re
from pathlib import Path
from zlib import crc32

import pytest

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.registry import LAWS
from pylora.conformance.mutants import GROUPS, Mutant, mutants
from pylora.conformance.mutants.hunt import concerned, hunt, killer
from pylora.conformance.running.counterexample import fails, right
from pylora.conformance.running.runner import PASSED, run_law

ALL = mutants()
# A night's work is every one of them; a run of the tests takes those whose ids fall into a twelfth.
ASKED = (
    ALL
    if os.environ.get("PYLORA_ALL_MUTANTS")
    else [m for m in ALL if crc32(m.id.encode()) % 12 == 0]
)


@pytest.mark.parametrize("law", LAWS.values(), ids=list(LAWS))
def test_the_correct_one_lives(law):
    outcome = run_law(Correct(), law, examples=8, seed=1)
    assert outcome.status == PASSED, outcome.reason


@pytest.mark.parametrize("mutant", ASKED, ids=lambda m: m.id)
def test_the_mutant_dies_and_its_program_tells_it_from_the_correct_one(mutant):
    found = killer(mutant)
    assert found is not None, f"no law finds out: {mutant.sentence}"
    program = found.counterexample
    assert fails(program, mutant.make()), program
    assert not fails(program, right(mutant.make())), program


def test_there_are_enough_and_each_is_told():
    assert len(ALL) >= 45
    assert {m.group for m in ALL} == {g.__name__ for g in GROUPS}
    assert len({m.sentence for m in ALL}) == len({m.story for m in ALL}) == len(ALL)
    assert {m.kind for m in ALL} == {"gross", "subtle"}
    for mutant in ALL:
        assert mutant.make().name == f"mutant {mutant.id}"
        assert mutant.sentence.endswith(".") and mutant.story.endswith(".")
        assert mutant.thread is None or re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", mutant.thread)
        assert (mutant.link is None) == (mutant.thread is None)


def test_the_table_in_the_docs_is_of_these_mutants():
    text = (Path(__file__).parents[2] / "docs" / "mutants.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([\w-]+)`", text, re.MULTILINE)
    assert told == [m.id for m in ALL], "run tools/mutant_table.py"
    assert all(m.link in text for m in ALL if m.link)


def test_only_laws_that_use_what_a_mutant_changes_are_run():
    by_id = {m.id: m for m in ALL}
    ids = {law.id for law in concerned(by_id["scale-alpha"])}
    assert ids >= {"S1", "S2"} and all("scaling" in LAWS[id].needs for id in ids)
    ids = {law.id for law in concerned(by_id["attention-k-adapter-after-rope"])}
    assert ids >= {"A1", "A2", "A3", "A4", "A13", "G4"} and not ids & {"F1", "M1", "E3", "B20"}


def test_a_mutant_that_is_not_one_is_not_killed():
    same = Mutant("same", "gross", "It is right.", "A control.", None, _Same, __name__)
    assert concerned(same, [LAWS["S1"], LAWS["F2"]]) == [LAWS["S1"]]
    assert killer(same) is None


def test_the_hunt_says_who_survives(monkeypatch):
    same = Mutant("same", "gross", "It is right.", "A control.", None, _Same, __name__)
    dead = next(m for m in ALL if m.id == "scale-alpha")
    said: list[str] = []
    monkeypatch.setattr("pylora.conformance.mutants.hunt.mutants", lambda: (dead, same))
    assert not hunt(said.append)
    assert re.fullmatch(r"scale-alpha +S\d +at example \d+", said[0])
    assert said[1].split() == ["same", "SURVIVES"]
    assert said[2] == "2 mutants, 1 killed, 1 alive"


class _Same(Correct):
    def scaling(self, alpha: float, r: int, use_rslora: bool) -> float:
        return super().scaling(alpha, r, use_rslora)
