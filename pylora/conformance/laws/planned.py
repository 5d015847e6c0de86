"""Laws of plans on module trees that invite mistakes, against the rules written out (rules.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pylora.conformance.laws.law import Law
from pylora.conformance.laws.plan import RAISES, compare
from pylora.conformance.laws.rules import PATTERNS, Planned, Refused, Rules
from pylora.conformance.problems.trees import systematic, trees
from pylora.conformance.testcase import NotTested, Problem, Trial


def accepted(p: Problem) -> Problem:
    """The problem without what the rules refuse: settings that match nothing are left out."""
    config = dict(p.config)
    for field in ("exclude_modules", "layers_to_transform"):
        try:
            Rules(config, p.modules).plan()
        except Refused as why:
            if "pattern" not in str(why):
                config.pop(field, None)
                if field == "layers_to_transform":
                    config.pop("layers_pattern", None)
    rules = Rules({**config, "rank_pattern": {}, "alpha_pattern": {}}, p.modules)
    chosen = rules.plan()
    for field in PATTERNS:
        kept = {
            key: value
            for key, value in (config.get(field) or {}).items()
            if any(rules.pattern_matches(key, path) for path in chosen)
        }
        config.pop(field, None)
        if kept:
            config[field] = kept
    return p.replaced(config=config)


def settled(p: Problem) -> tuple[Problem, Planned]:
    """The problem, accepted, and its plan. NotTested where even that leaves nothing."""
    try:
        return p, Rules(p.config, p.modules).plan()
    except Refused:
        pass  # something in it matches nothing: without that, then
    try:
        p = accepted(p)
        return p, Rules(p.config, p.modules).plan()
    except Refused as why:
        raise NotTested(str(why)) from None


def _agrees(t: Trial, p: Problem) -> None:
    p, want = settled(p)
    compare(t, t.plan(p.config, p.modules), want)


def _refuses(t: Trial, p: Problem) -> None:
    """What the rules refuse; and one setting that matches nothing, beside others that do."""
    try:
        Rules(p.config, p.modules).plan()
    except Refused as why:
        t.must_raise(f"{p.config}: {why}", "plan", p.config, p.modules)
        return
    p, chosen = settled(p)
    t.plan(p.config, p.modules)  # as it is, it must be accepted
    path = sorted(chosen)[p.seed % len(chosen)]
    leaf, head = path.rsplit(".", 1)[-1], path.split(".")[0]
    unchosen = sorted(set(p.modules) - set(chosen))
    targets = p.config["target_modules"]
    kinds: list[dict[str, Any]] = [
        {name: {**(p.config.get(name) or {}), key: 4}}
        for name in PATTERNS
        for key in (f"x{leaf}", f"{leaf}x", leaf[1:] or "x", head + "x", re.escape(path) + "x",
                    *(re.escape(u) for u in unchosen[:1]))
        if not any(Rules(p.config, p.modules).pattern_matches(key, c) for c in chosen)
    ]  # fmt: skip
    odd = [n for n in (f"x{leaf}", f"{leaf}x", leaf.upper(), head, f"{path}.", f" {leaf}")
           if not any(m == n or m.endswith("." + n) for m in p.modules)]  # fmt: skip
    if isinstance(targets, list):
        kinds += [{"target_modules": [*targets, name]} for name in odd]
        kinds += [
            {"target_modules": [leaf], "layers_to_transform": [10**6], "layers_pattern": None}
        ]
        kinds += [{"target_modules": [leaf], "layers_to_transform": [0, 1, 777]}]
    kinds += [{"target_modules": f"{re.escape(path)}x"}, {"target_modules": re.escape(path[:-1])}]
    kinds += [{"exclude_modules": [name]} for name in odd]
    kinds += [{"exclude_modules": sorted(p.modules)}, {"exclude_modules": ".*"}]
    kinds += [{"target_modules": []}, {"target_modules": ""}, {"target_modules": None}]
    kinds += [
        {"rank_pattern": {"(": 3}},
        {"target_modules": "*q_proj"},
        {"alpha_pattern": {"[": 1}},
    ]
    for change in _turned(kinds, p.seed):
        config = {**p.config, **change}
        if isinstance(config["target_modules"], str) and config["target_modules"] != targets:
            config = {k: v for k, v in config.items() if not k.startswith("layers_")}
        t.must_raise(f"{change}, which matches nothing, or everything", "plan", config, p.modules)


def _refused(dtype: str, examples: int) -> list[Problem]:
    """Of the systematic ones those that the rules refuse."""

    def is_refused(p: Problem) -> bool:
        try:
            Rules(p.config, p.modules).plan()
        except Refused:
            return True
        return False

    return [p for p in systematic(dtype, examples) if is_refused(p)]


def _turned(items: Sequence[Any], seed: int) -> list[Any]:
    """All of them, beginning with one that the seed chooses."""
    at = seed % max(len(items), 1)
    return [*items[at:], *items[:at]]


BAD_RANKS: tuple[Any, ...] = (
    0, -1, -(2**31), 2.5, float("nan"), float("inf"), "4", None, True, False, [4], {}, 10**30,
)  # fmt: skip
BAD_ALPHAS: tuple[Any, ...] = (
    float("nan"), float("inf"), -float("inf"), "16", None, True, [16], {}, "1e3", 10**400,
)  # fmt: skip


def _numbers(t: Trial, p: Problem) -> None:
    p, chosen = settled(p)
    path = re.escape(sorted(chosen)[0])
    for name in _turned(("r", "lora_alpha", "rank_pattern", "alpha_pattern"), p.seed):
        for value in BAD_RANKS if name in ("r", "rank_pattern") else BAD_ALPHAS:
            change = {name: value} if name in ("r", "lora_alpha") else {name: {path: value}}
            said = f"{name} = {change[name]!r:.60}"
            t.must_raise(said, "plan", {**p.config, **change}, p.modules)


WRONG: tuple[tuple[str, Any], ...] = (
    ("use_rslora", "yes"), ("use_rslora", 2), ("use_rslora", "false"), ("bias", "some"),
    ("peft_type", "LOHA"), ("peft_type", "IA3"), ("peft_type", 7), ("target_modules", 5),
    ("target_modules", {"q_proj": True}), ("target_modules", [3]), ("target_modules", [None]),
    ("exclude_modules", 5), ("exclude_modules", [1]), ("layers_to_transform", "1"),
    ("layers_to_transform", [1.5]), ("layers_to_transform", ["1"]), ("layers_to_transform", [True]),
    ("rank_pattern", [["q_proj", 3]]), ("rank_pattern", "q_proj"), ("alpha_pattern", 3),
    ("init_lora_weights", "no such way"), ("init_lora_weights", 3), ("lora_dropout", 1.0),
    ("lora_dropout", -0.1), ("lora_dropout", float("nan")), ("lora_dropout", "0.1"),
    ("layers_pattern", 3), ("rslora", True), ("rank", 4), ("alpha", 4),
    ("lora_alpha_pattern", {"x": 1}), ("bias", 1),
    ("use_bdlora", {"nblocks": 2}), ("use_qalora", True), ("alora_invocation_tokens", [1, 2]),
    ("layer_replication", [[0, 1], [0, 1]]), ("target_parameters", ["w"]),
    ("scaling", 2.0), ("no_such_field", 3), ("No_such", "x"),
)  # fmt: skip


def _settings(t: Trial, p: Problem) -> None:
    p, _ = settled(p)
    for name, value in _turned(WRONG, p.seed):
        config = {**p.config, name: value}
        if name.startswith("layers_"):
            if isinstance(config["target_modules"], str):
                continue  # layers go with names
            config.setdefault("layers_to_transform", [1])
        t.must_raise(f"{name} = {value!r}", "plan", config, p.modules)


EMPTY: dict[str, tuple[Any, ...]] = {
    "rank_pattern": ({},), "alpha_pattern": ({},), "exclude_modules": (None, []),
    "layers_to_transform": (None, []), "layers_pattern": (None, []), "modules_to_save": (None, []),
    "use_dora": (False,), "bias": ("none",), "lora_bias": (False,), "fan_in_fan_out": (False,),
    "revision": (None, "main"), "task_type": (None,), "inference_mode": (True, False),
    "peft_version": ("0.19.0", None), "auto_mapping": (None,), "lora_dropout": (0.0, 0.1, 0),
    "base_model_name_or_path": (None, "a/b"), "layer_replication": (None,),
    "target_parameters": (None,), "megatron_core": ("megatron.core",), "loftq_config": ({},),
}  # fmt: skip


def _absent(t: Trial, p: Problem) -> None:
    """Null and empty values, and fields that have no effect."""
    p, want = settled(p)
    config = dict(p.config)
    for i, (name, values) in enumerate(EMPTY.items()):
        if name not in config and (p.seed >> (i % 16)) % 2:
            if name == "layers_pattern" and config.get("layers_to_transform") is None:
                continue
            if name.startswith("layers_") and isinstance(config["target_modules"], str):
                continue  # PEFT takes no list there, not even an empty one
            config[name] = values[p.seed % len(values)]
    compare(t, t.plan(config, p.modules), want)


def _order(t: Trial, p: Problem) -> None:
    """The order of settings, of modules and of targets says nothing; that of pattern keys does."""
    p, want = settled(p)
    config = dict(sorted(p.config.items(), reverse=p.seed % 2 == 0))
    if isinstance(config["target_modules"], list):
        config["target_modules"] = config["target_modules"][::-1]
    compare(t, t.plan(config, dict(reversed(list(p.modules.items())))), want)
    for name in PATTERNS:
        turned = dict(reversed(list((p.config.get(name) or {}).items())))
        if len(turned) > 1:
            other = {**p.config, name: turned}
            compare(t, t.plan(other, p.modules), Rules(other, p.modules).plan())


def _scales(t: Trial, p: Problem) -> None:
    """Every module's scale is its own, also where rsLoRA meets a pattern."""
    path = sorted(p.modules, key=len)[-1 - p.seed % 3]
    config = {
        "r": 4, "lora_alpha": 10, "target_modules": sorted(p.modules),
        "rank_pattern": {re.escape(path): 9}, "alpha_pattern": {re.escape(path): 7},
    }  # fmt: skip
    for rslora in (True, False):
        settings = {**config, "use_rslora": rslora}
        compare(t, t.plan(settings, p.modules), Rules(settings, p.modules).plan())


def _law(
    id: str, sentence: str, maths: str, violation: str, spec: tuple[str, ...], check: Any
) -> Law:
    cost = {_agrees: 4, _refuses: 10, _numbers: 10, _settings: 10}.get(check, 3)
    covering: Any = {_agrees: systematic, _refuses: _refused}.get(check)
    return Law(
        id, sentence, maths, violation, spec, ("plan",), trees, check, (), cost=cost,
        covering=covering,
    )  # fmt: skip


LAWS = (
    _law(
        "T20",
        "The plan is that of the rules, on trees of modules that invite mistakes.",
        "T-1 to T-5 on layers 1, 10 and 100, q_proj, xq_proj and q_proj_2, experts, blocks in "
        "blocks, two towers; targets by name, path and expression, layers_pattern as a string and "
        "a list, patterns of every form",
        "layers.1 also means layers.10, the layer's number is an expert's, a pattern is ignored",
        ("T-1", "T-2", "T-3", "T-4", "T-5", "S-2"),
        _agrees,
    ),
    _law(
        "T21",
        "Whatever matches nothing is an error, on such trees too.",
        RAISES,
        "a typing error leaves modules out, or with another rank, silently",
        ("T-6",),
        _refuses,
    ),
    _law(
        "T22",
        "A rank or alpha that is no such number is an error, by itself and in a pattern.",
        "r: 0, -1, 2.5, NaN, infinity, a text, true, a list, 10³⁰; alpha: NaN, infinity, a text, "
        "true, a list, 10⁴⁰⁰",
        "infinity is a scale, true is rank 1, a text is repeated",
        ("T-8",),
        _numbers,
    ),
    _law(
        "T23",
        "A setting that is unknown, of another type, or of another method is an error.",
        RAISES,
        "what was asked for is not done, silently",
        ("K-6", "T-9"),
        _settings,
    ),
    _law(
        "T24",
        "Null, empty and inert settings are as if they were absent.",
        "plan with null and empty values = plan without",
        "files of other versions of PEFT cannot be read, or mean something else",
        ("T-9",),
        _absent,
    ),
    _law(
        "T25",
        "The order of settings, modules and targets does not matter; that of pattern keys does.",
        "plan of permuted settings = plan; with the keys of a pattern reversed, the other first",
        "a set's order decides, or keys are sorted on the way",
        ("T-5", "T-1"),
        _order,
    ),
    _law(
        "T26",
        "rsLoRA and patterns go together.",
        "s = alpha / sqrt(r) with the module's own alpha and r, and alpha / r without rsLoRA",
        "the root is of the default rank, or rsLoRA is for modules without pattern only",
        ("S-1", "S-2"),
        _scales,
    ),
)
