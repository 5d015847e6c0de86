"""Laws of the plan: which modules are adapted, with which rank, alpha and scale; and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pylora.conformance.laws.files import expected, fitting
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import plans
from pylora.conformance.testcase import Problem, Trial


def compare(t: Trial, got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    if set(got) != set(want):
        lost, more = sorted(set(want) - set(got)), sorted(set(got) - set(want))
        holds = f"set(RESULT) == set({sorted(want)!r})"
        t.fail(f"the plan lacks {lost} and has {more} too much", got, holds)
    for path, (r, alpha, scale) in want.items():
        t.expect(f"rank of {path}", got, r, item=(path, 0))
        t.expect(f"alpha of {path}", got, alpha, item=(path, 1))
        t.expect(f"scale of {path}", got, scale, 2.0**-22 * abs(scale), item=(path, 2))


def _agrees(t: Trial, p: Problem) -> None:
    p = fitting(p)
    compare(t, t.plan(p.config, p.modules), expected(p.config, p.modules))


def _dots(t: Trial, p: Problem) -> None:
    """A module whose name merely ends in a target's letters is no target."""
    p, modules = fitting(p), dict(p.modules)
    for target in p.config["target_modules"]:
        modules[f"model.layers.0.self_attn.x{target}"] = (2, 3)
        modules[f"model.layers.0.{target}_more"] = (2, 3)
    compare(t, t.plan(p.config, modules), expected(p.config, modules))


def _regex(t: Trial, p: Problem) -> None:
    """A string is a regular expression for the whole path."""
    name = p.config["target_modules"][0]
    config = {k: v for k, v in p.config.items() if not k.endswith("_pattern")}
    as_list = {**config, "target_modules": [name]}
    got = t.plan({**config, "target_modules": rf".*\.{name}"}, p.modules)
    compare(t, got, expected(as_list, p.modules))
    part = f"layers.0.self_attn.{name}"  # matches only part of a path
    t.must_raise(
        f"target_modules = {part!r}, which is no whole path",
        "plan",
        {**config, "target_modules": part},
        p.modules,
    )


def _all_linear(t: Trial, p: Problem) -> None:
    config = {k: v for k, v in p.config.items() if not k.endswith("_pattern")}
    named = {**config, "target_modules": sorted({q.rsplit(".", 1)[1] for q in p.modules})}
    word = ("all-linear", "ALL-LINEAR")[p.seed % 2]
    got = t.plan({**config, "target_modules": word}, {**p.modules, "lm_head": (3, 2)})
    compare(t, got, expected(named, p.modules))


def _whole_keys(t: Trial, p: Problem) -> None:
    name = p.config["target_modules"][0]
    modules = {**p.modules, f"model.layers.0.self_attn.x{name}": (2, 3)}
    targets = [*p.config["target_modules"], f"x{name}"]
    config = {**p.config, "target_modules": targets, "rank_pattern": {name: 6}}
    config["alpha_pattern"] = {f".*{name}": 5, name: 9}
    compare(t, t.plan(config, modules), expected(config, modules))


def _first_match(t: Trial, p: Problem) -> None:
    """Of several keys that match, the first in the config's order decides."""
    name = p.config["target_modules"][0]
    paths = [path for path in p.modules if path.endswith("." + name)]
    last = paths[-1].removeprefix("model.")
    config = {**p.config, "rank_pattern": {last: 3, name: 6}, "alpha_pattern": {name: 5, last: 9}}
    compare(t, t.plan(config, p.modules), expected(config, p.modules))


def _exclude(t: Trial, p: Problem) -> None:
    targets = p.config["target_modules"]
    config = {k: v for k, v in p.config.items() if not k.endswith("_pattern")}
    path = next(q for q in p.modules if q.endswith("." + targets[0]))
    got = t.plan(
        {**config, "exclude_modules": [path]}, {**p.modules, f"other.{targets[0]}": (1, 1)}
    )
    want = expected(config, {**p.modules, f"other.{targets[0]}": (1, 1)})
    want.pop(path)
    compare(t, got, want)


def _layers(t: Trial, p: Problem) -> None:
    config = {k: v for k, v in p.config.items() if not k.endswith("_pattern")}
    layers = sorted({int(path.split(".")[2]) for path in p.modules})
    layer = layers[p.seed % len(layers)]
    got = t.plan({**config, "layers_to_transform": [layer]}, p.modules)
    want = {q: e for q, e in expected(config, p.modules).items() if q.split(".")[2] == str(layer)}
    compare(t, got, want)


def _must_raise(change: Callable[[Problem], tuple[dict[str, Any], str]]) -> Any:
    def check(t: Trial, p: Problem) -> None:
        p = fitting(p)
        t.plan(p.config, p.modules)  # unchanged, it must be accepted
        more, why = change(p)
        t.must_raise(why, "plan", {**p.config, **more}, p.modules)

    return check


def _unknown_target(p: Problem) -> tuple[dict[str, Any], str]:
    targets = [*p.config["target_modules"], "qproj"]
    return {"target_modules": targets}, f"target_modules = {targets}, where 'qproj' is no module"


def _unknown_key(p: Problem) -> tuple[dict[str, Any], str]:
    name = ("rank_pattern", "alpha_pattern")[p.seed % 2]
    patterns = {**p.config.get(name, {}), "qproj": 4}
    return {name: patterns}, f"{name} = {patterns}, where 'qproj' matches no target"


def _bad_number(p: Problem) -> tuple[dict[str, Any], str]:
    name, value = (("r", 0), ("r", -1), ("lora_alpha", float("nan")), ("r", 2.5))[p.seed % 4]
    return {name: value}, f"{name} = {value}"


_OTHERS: tuple[tuple[str, Any], ...] = (
    ("use_bdlora", {"nblocks": 2}),
    ("use_qalora", True),
    ("no_such_field", 3),
)


def _other_method(p: Problem) -> tuple[dict[str, Any], str]:
    name, value = _OTHERS[p.seed % 3]
    return {name: value}, f"{name} = {value}, which changes the result, as if it were not there"


def _no_layer(p: Problem) -> tuple[dict[str, Any], str]:
    return {"layers_to_transform": [99]}, "layers_to_transform = [99] of a model with fewer layers"


def _law(
    id: str, sentence: str, maths: str, violation: str, spec: tuple[str, ...], check: Any
) -> Law:
    return Law(id, sentence, maths, violation, spec, ("plan",), plans, check, ())


RAISES = "plan(config) must raise, where plan without the fault does not"
LAWS = (
    _law(
        "T1",
        "Each module has the rank, alpha and scale that the config gives it.",
        "r and alpha by the first pattern that matches, else the default; s by S-1",
        "rank_pattern, alpha_pattern or use_rslora is ignored",
        ("S-1", "S-2", "T-1", "T-5"),
        _agrees,
    ),
    _law(
        "T2",
        "A target names whole parts of a path, at its end.",
        "q_proj chooses x.q_proj, and neither x.xq_proj nor x.q_proj_more",
        "modules are adapted that nobody named",
        ("T-1",),
        _dots,
    ),
    _law(
        "T3",
        "A string of targets is a regular expression for the whole path.",
        "'.*\\.q_proj' chooses as the list ['q_proj'] does; a part of a path matches nothing",
        "it is searched for anywhere, or taken for a name",
        ("T-2", "T-6"),
        _regex,
    ),
    _law(
        "T4",
        "Of several patterns that match, the first decides.",
        "rank_pattern = {whole path: 3, name: 6} gives 3 there and 6 elsewhere",
        "the last, or the longest, decides: the scale differs from PEFT's",
        ("T-5",),
        _first_match,
    ),
    _law(
        "T12",
        '"all-linear" chooses every linear module but the output layer.',
        "as a list of all their names does; lm_head is not among them",
        "the output layer is adapted, which PEFT's readers do not expect",
        ("T-2",),
        _all_linear,
    ),
    _law(
        "T13",
        "A pattern's key matches the whole path or what follows a dot.",
        "rank_pattern = {q_proj: 6} says nothing of x.xq_proj; '.*q_proj' does",
        "the key is searched for anywhere: layers.1 also means layers.11",
        ("T-5",),
        _whole_keys,
    ),
    _law(
        "T5",
        "An excluded module is not adapted.",
        "exclude_modules wins over target_modules",
        "it is ignored",
        ("T-3", "K-6"),
        _exclude,
    ),
    _law(
        "T6",
        "layers_to_transform keeps these layers only.",
        "the plan has the targets of that layer, and no others",
        "it is ignored",
        ("T-4", "K-6"),
        _layers,
    ),
    _law(
        "T7",
        "A target that matches nothing is an error.",
        RAISES,
        "a typing error leaves modules without adapter, silently",
        ("T-6",),
        _must_raise(_unknown_target),
    ),
    _law(
        "T8",
        "A pattern that matches nothing is an error.",
        RAISES,
        "a typing error leaves modules with another rank or alpha, silently",
        ("T-6",),
        _must_raise(_unknown_key),
    ),
    _law(
        "T9",
        "A rank or alpha that is not possible is an error.",
        RAISES,
        "a division by zero, or a negative rank, comes later and elsewhere",
        ("S-1",),
        _must_raise(_bad_number),
    ),
    _law(
        "T10",
        "A setting that is not carried out is an error.",
        RAISES,
        "an adapter of another method (QA-LoRA, ...) is run as plain LoRA",
        ("K-6",),
        _must_raise(_other_method),
    ),
    _law(
        "T11",
        "A layer that the model does not have is an error.",
        RAISES,
        "the adapter is smaller than was asked for, silently",
        ("T-6",),
        _must_raise(_no_layer),
    ),
)
