"""The base's log-probabilities: computed once, kept, and never another base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preferences import preferences
from training import problem

from pylora.training.objectives.answers import Answer
from pylora.training.objectives.reference import FILE, Reference


def all_answers() -> list[Answer]:
    return [a for item in preferences() for a in item.answers]


def test_it_is_the_base_without_its_adapter(ops: Any) -> None:
    model, adapter = problem(ops)
    for lora in adapter.values():
        lora.B[...] = 1.0
    model.attach(adapter)
    reference, answers = Reference(), all_answers()
    reference.fill(model, answers)
    assert model.adapter is adapter
    model.detach()
    for answer in answers:
        nll, _ = model.loss(answer.ids, answer.labels, grads=False)
        assert reference[answer] == -float(np.sum(nll.astype(np.float64)))


def test_no_number_depends_on_what_is_computed_together() -> None:
    model, _ = problem("c")
    answers = all_answers()
    found = []
    for rows in (1, 20, 4096):
        reference = Reference(batch_rows=rows)
        reference.fill(model, answers)
        found.append(reference.values)
    assert found[0] == found[1] == found[2]


def test_it_is_computed_once(tmp_path: Path) -> None:
    model, _ = problem("c")
    answers = all_answers()
    first, second = Reference(), Reference()
    first.fill(model, answers, tmp_path)
    assert first.computed == len({a.digest for a in answers})
    second.fill(model, answers, tmp_path)
    assert second.computed == 0 and second.values == first.values
    more = preferences(2, seed=5)[0].answers
    second.fill(model, [*answers, *more], tmp_path)
    assert second.computed == 2
    third = Reference()
    third.fill(model, [*answers, *more], tmp_path)
    assert third.computed == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"of": 1}', "another base", "nan"])
def test_a_file_of_something_else_is_not_used(damage: str, tmp_path: Path) -> None:
    model, _ = problem("c")
    answers = all_answers()
    good = Reference()
    good.fill(model, answers)
    other, _ = problem("c", seed=1)
    Reference().fill(other, answers, tmp_path)
    file = tmp_path / FILE
    if damage == "nan":
        Reference().fill(model, answers, tmp_path)
        text = json.loads(file.read_text())
        file.write_text(json.dumps(text | {"logp": dict.fromkeys(text["logp"], float("nan"))}))
    elif damage != "another base":
        file.write_text(damage)
    reference = Reference()
    reference.fill(model, answers, tmp_path)
    assert reference.values == good.values and reference.computed == len(good.values)
