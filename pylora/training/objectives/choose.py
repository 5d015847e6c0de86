"""The objectives by name: what `--objective` takes, with the numbers that each has."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from pylora.errors import ConfigError
from pylora.training import examples as plain
from pylora.training.examples import Examples
from pylora.training.objectives.base import NextToken, Objective
from pylora.training.objectives.classify import Classify, Regress
from pylora.training.objectives.distill import Distill
from pylora.training.objectives.dpo import DPO
from pylora.training.objectives.ipo import IPO
from pylora.training.objectives.items import Items
from pylora.training.objectives.kto import KTO
from pylora.training.objectives.labelled import LabelledItems, load_classes, load_numbers
from pylora.training.objectives.likelihood import Likelihood
from pylora.training.objectives.orpo import ORPO
from pylora.training.objectives.preference_records import load_preferences, load_verdicts
from pylora.training.objectives.settings import Settings
from pylora.training.objectives.simpo import SimPO

_LIKELIHOODS: dict[str, type[Likelihood]] = {c.name: c for c in (DPO, IPO, SimPO, ORPO, KTO)}
# Where an objective's own paper and programs differ from the common default.
_DEFAULTS: dict[str, dict[str, float]] = {"simpo": {"beta": 2.0, "gamma": 1.0}}

_HEADS: dict[str, type[Classify]] = {c.name: c for c in (Classify, Regress)}

NAMES = ("sft", *_LIKELIHOODS, *_HEADS, "distill")


def check_name(name: str) -> str:
    """ConfigError unless there is such an objective."""
    if name not in NAMES:
        near = difflib.get_close_matches(str(name).lower(), NAMES, 1)
        raise ConfigError(
            f"objective is {name!r}; it must be one of {', '.join(NAMES)}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return name


def choose(name: str, **settings: Any) -> Objective:
    """The objective of that name. A setting that is None is not given; ConfigError, naming it, for
    one that the objective does not have, or that is out of range."""
    check_name(name)
    given = {key: value for key, value in settings.items() if value is not None}
    uses = _LIKELIHOODS[name].uses if name in _LIKELIHOODS else ()
    uses = Distill.uses if name == "distill" else uses
    for key in given:
        if key not in {f.name for f in fields(Settings)}:
            raise ConfigError(f"there is no setting {key!r} of an objective")
        if key not in uses:
            has = f"it has {', '.join(uses)}" if uses else "it has none"
            raise ConfigError(f"{key} is no setting of the objective {name}: {has}")
    if name == "sft":
        return NextToken()
    if name in _HEADS:
        return _HEADS[name]()
    if name == "distill":
        return Distill(Settings(**given))
    return _LIKELIHOODS[name](Settings(**{**_DEFAULTS.get(name, {}), **given}))


def loader(name: str) -> Callable[..., Items | Examples]:
    """What reads a file for an objective: (path, tokenizer, **options) -> its items; of distill the
    examples, which a teacher has to see (`teach`)."""
    if name in ("sft", "distill"):
        return plain.load_examples
    if name in _HEADS:
        return load_classes if name == "classify" else load_numbers
    return load_verdicts if name == "kto" else load_preferences


def read(
    name: str, data: Any, evals: Any, tokenizer: Any, *, classes: str | None = None, **options: Any
) -> tuple[Items | Examples, Items | Examples | None]:
    """The items of a file to train on and, if there is one, of a file to evaluate on, whose classes
    are those of the first. `classes`: see `load_classes`."""
    load = loader(name)
    if classes is not None and name != "classify":
        raise ConfigError(f"classes are no setting of the objective {name}")
    given: dict[str, Any] = {"classes": classes} if name == "classify" else {}
    items = load(data, tokenizer, **given, **options)
    if isinstance(items, LabelledItems) and name == "classify":
        given = {"classes": items.classes}
    return items, load(evals, tokenizer, **given, **options) if evals else None
