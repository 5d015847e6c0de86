"""Hypothesis strategies: module trees in which a careless match goes wrong, and settings for them.

Each theme is a kind of mistake: prefixes (`layers.1` and `layers.10`), names that end alike
(`proj`, `q_proj`, `xq_proj`), numbers in other places of a path than the layer's, layers_pattern in
each of its forms, patterns as regular expressions and their order, exclusions, targets as a list, a
whole path or an expression.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from pylora.conformance.problems.layers import pick, st
from pylora.conformance.testcase import Problem

LEAVES = ("q_proj", "v_proj", "proj", "q_proj_2", "xq_proj", "up_proj", "proj_up")


def _paths(heads: tuple[str, ...], leaves: tuple[str, ...]) -> list[str]:
    return [f"{head}.{leaf}" for head in heads for leaf in leaves]


def _layers(numbers: tuple[int, ...], head: str = "model.layers.{}.self_attn") -> tuple[str, ...]:
    return tuple(head.format(n) for n in numbers)


TREES: dict[str, list[str]] = {
    "many layers": _paths(_layers((0, 1, 2, 10, 11, 12, 21, 100)), ("q_proj", "v_proj")),
    "names alike": [*_paths(_layers((0, 1)), LEAVES), "q_proj"],
    "experts": [
        *_paths(_layers((1, 3), "model.layers.{}.mlp.experts.5"), ("up_proj", "q_proj")),
        *_paths(_layers((1, 3), "model.layers.{}.mlp.experts.1"), ("up_proj", "q_proj")),
        *_paths(_layers((5,), "model.layers.{}.mlp.experts.3"), ("up_proj", "q_proj")),
    ],
    "blocks in blocks": _paths(
        ("encoder.blocks.2.layers.1.attn", "encoder.blocks.1.layers.2.attn",
         "encoder.blocks.1.layers.1.attn", "decoder.blocks.2.layers.2.attn"),
        ("q_proj", "v_proj"),
    ),
    "two towers": _paths(
        ("vision_tower.layers.0.attn", "vision_tower.layers.1.attn",
         "language_model.model.layers.0.attn", "language_model.model.layers.1.attn"),
        ("q_proj", "v_proj"),
    ),
    "short": [*_paths(("h.0.attn", "h.1.attn", "h.10.attn"), ("q_proj", "v_proj")), "x.h.1.q_proj"],
    "numbers as names": [
        "model.0.q_proj", "model.1.q_proj", "model.layers.1.0.q_proj", "model.layers.0.1.q_proj",
        "model.layers.0.fc1.q_proj", "model.layers.1.fc2.v_proj",
    ],
    "odd names": [
        "model.my_layers.0.q_proj", "model.my_layers.1.q_proj", "model.layers.0.q_proj",
        "model.layers.1.q_proj", "model.layersX1.q_proj", "model.layers.1.q-proj",
    ],
}  # fmt: skip
KEYS = (
    "{leaf}", "{path}", "layers.{n}.*{leaf}", "layers.{n}.*", ".*{leaf}", r".*\.{n}\..*", "{tail}",
    r"layers\.{n}\..*{leaf}", "^{path}$", "({leaf}|v_proj)", "[qv]_proj", r".*\.{leaf}$",
    "self_attn.{leaf}", "attn.{leaf}", ".*", "{leaf}.*", "{n}.*{leaf}", "(?:.*{leaf})",
)  # fmt: skip
LAYERS_PATTERNS: tuple[Any, ...] = (
    None, "layers", ["layers"], "blocks", ["h", "layers"], ["layers", "blocks"], [], "experts", "h",
    "model.layers", "(?:layers|blocks)",
)  # fmt: skip
EXPRESSIONS = (
    r".*\.{leaf}", r".*{leaf}", r".*\.layers\.{n}\..*_proj", "{path}", r".*(q|v)_proj",
    r".*\.{n}\..*_proj", r"(?!lm_head).*_proj", r".*\.(?:{leaf}|v_proj)$", "all-linear",
    "All-Linear",
)  # fmt: skip
ALPHAS = (16, 1, 8, 3, 2.5, 0.5, 1e-3, 64.0)


@st.composite  # type: ignore[untyped-decorator]
def trees(draw: Any) -> Problem:
    """A config and {path: (d, k)}. What the config names may be missing, or match nothing."""
    theme = draw(pick(tuple(TREES)))
    paths = TREES[theme]
    modules = {path: (2 + len(path) % 3, 3 + i % 2) for i, path in enumerate(paths)}

    def filled(text: str) -> str:
        path = draw(pick(tuple(paths)))
        numbers = [part for part in path.split(".") if part.isdigit()] or ["0"]
        leaf, tail = path.rsplit(".", 1)[-1], ".".join(path.split(".")[-2:])
        return text.format(path=path, leaf=leaf, tail=tail, n=draw(pick(tuple(numbers))))

    config: dict[str, Any] = {
        "r": draw(pick((4, 1, 2, 9, 64))),
        "lora_alpha": draw(pick(ALPHAS)),
        "use_rslora": draw(st.booleans()),
    }
    form = draw(pick(("names", "names", "names", "expression", "paths")))
    if form == "expression":
        config["target_modules"] = filled(draw(pick(EXPRESSIONS)))
    else:
        pattern = ("{leaf}", "{leaf}", "{tail}") if form == "names" else ("{path}", "{leaf}")
        names = [filled(draw(pick(pattern))) for _ in range(draw(st.integers(1, 3)))]
        config["target_modules"] = list(dict.fromkeys(names))
        if draw(st.booleans()):
            layers = st.lists(pick((1, 0, 2, 10, 3, 5, 100)), min_size=1, max_size=3, unique=True)
            config["layers_to_transform"] = draw(layers)
            if len(config["layers_to_transform"]) == 1 and draw(st.booleans()):
                config["layers_to_transform"] = config["layers_to_transform"][0]
            config["layers_pattern"] = draw(pick(LAYERS_PATTERNS))
    if draw(pick((False, True, False))):
        some = [filled(draw(pick(("{leaf}", "{path}", "{tail}"))))]
        config["exclude_modules"] = draw(pick((some, filled(r".*\.{n}\..*"), filled("{path}"))))
    for name, values in (("rank_pattern", (3, 5, 7)), ("alpha_pattern", (2, 7.5, 30))):
        if draw(st.booleans()):
            keys = [filled(draw(pick(KEYS))) for _ in range(draw(st.integers(1, 3)))]
            config[name] = {key: draw(pick(values)) for key in keys}
    return Problem(config=config, modules=modules, seed=draw(st.integers(0, 2**16)))


@cache
def systematic(dtype: str = "", examples: int = 100) -> list[Problem]:
    """Of each tree: every form of layers, exclusions, expressions and keys, one at a time, beside
    settings that do nothing else; what the rules refuse is left to those who ask. Every eighth of
    them where few `examples` are asked for, all from 10 on."""
    out: list[Problem] = []
    for paths in TREES.values():
        modules = {path: (2 + len(path) % 3, 3 + i % 2) for i, path in enumerate(paths)}
        leaves = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
        numbers = sorted({part for path in paths for part in path.split(".") if part.isdigit()})
        plain = {"r": 4, "lora_alpha": 10, "target_modules": leaves, "use_rslora": False}

        def filled(text: str, path: str, n: str) -> str:
            leaf, tail = path.rsplit(".", 1)[-1], ".".join(path.split(".")[-2:])
            return text.format(path=path, leaf=leaf, tail=tail, n=n)

        changes: list[dict[str, Any]] = []
        for pattern in LAYERS_PATTERNS:
            layers = [{"layers_pattern": pattern, "layers_to_transform": [int(n)]} for n in numbers]
            changes += [*layers, {**layers[-1], "target_modules": [*leaves[:1], paths[0]]}]
        for i, (n, path) in enumerate(zip(numbers * 9, (paths[0], paths[len(paths) // 2]))):
            forms = {filled(key, path, n): 9 for key in (*KEYS, "layers.{n}", ".{n}.")}
            keys = list(forms)
            for j, (key, other) in enumerate(zip(keys, [*keys[1:], path])):
                name, second = ("rank_pattern", "alpha_pattern")[:: 1 if (i + j) % 2 else -1]
                changes.append({name: {key: 9}})
                changes.append({name: {key: 9, other: 3}, second: {other: 30, key: 7},
                                "use_rslora": j % 2 == 0})  # fmt: skip
            changes += [{"target_modules": filled(e, path, n)} for e in EXPRESSIONS]
            parts = path.split(".")
            names = [".".join(parts[j:]) for j in range(len(parts))]
            names += [filled(key, path, n) for key in (".{n}", "{leaf}_2", "x{leaf}")]
            changes += [{"target_modules": [name]} for name in names]
            changes += [{"target_modules": [*leaves, path], "exclude_modules": form}
                        for name in names for form in ([name], name)]  # fmt: skip
            changes += [{"exclude_modules": form} for form in (
                rf".*\.{n}\..*", rf".*{parts[-1]}", n, parts[-1], rf"(.*\.)?{n}\..*")]  # fmt: skip
        changes = list({repr(change): change for change in changes}.values())
        for change in changes:
            out.append(Problem(config={**plain, **change}, modules=modules, seed=len(out)))
    return out[:: 8 if examples < 10 else 1]
