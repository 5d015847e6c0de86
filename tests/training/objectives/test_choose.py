"""The objectives by name."""

from __future__ import annotations

from typing import Any

import pytest

from pylora.commands import objectives as on_the_command_line
from pylora.errors import ConfigError
from pylora.training.objectives.base import NextToken
from pylora.training.objectives.choose import NAMES, choose, loader


def test_the_command_line_names_all() -> None:
    assert on_the_command_line.NAMES == NAMES
    for name in NAMES:
        assert choose(name).name == name and callable(loader(name))


def test_what_is_not_given_is_what_the_paper_has() -> None:
    assert isinstance(choose("sft", beta=None), NextToken)
    assert choose("dpo").identity() == {"objective": "dpo", "beta": 0.1, "label_smoothing": 0.0}
    assert choose("simpo", gamma=0.3).identity()["beta"] == 2.0
    assert "label_smoothing" not in choose("ipo").identity()


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("dop", {}, "must be one of .*did you mean 'dpo'"),
        ("sft", {"beta": 0.1}, "beta is no setting of the objective sft: it has none"),
        ("ipo", {"label_smoothing": 0.1}, "no setting of the objective ipo: it has beta"),
        ("dpo", {"bta": 0.1}, "there is no setting 'bta'"),
        ("dpo", {"beta": 0}, "beta is 0; it must be above 0"),
        ("dpo", {"beta": float("nan")}, "beta is nan; it must be finite"),
        ("dpo", {"beta": "1"}, "beta is '1'; it must be a number"),
        ("dpo", {"label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ("simpo", {"gamma": -1}, "gamma is -1; it must be at least 0"),
        ("kto", {"desirable_weight": 0, "undesirable_weight": 0}, "nothing is learnt"),
    ],
)
def test_a_setting_that_means_nothing_is_named(
    name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose(name, **settings)
