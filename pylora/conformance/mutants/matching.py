"""Which modules a name, a number or an expression means: the rules of plans, each with a mistake.

Each mutant is `laws/rules.py` with one rule changed; what pylora refuses of settings stays refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pylora.adapters.loraconfig import LoraConfig
from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.rules import Planned, Refused, Rules
from pylora.conformance.mutants.registry import wrong

Modules = Mapping[str, tuple[int, int]]


class Ruled(Correct):
    """Correct, by `rules`."""

    rules: type[Rules] = Rules

    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        """The settings as this one reads them."""
        return config

    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        config = self.mended(config)
        LoraConfig.from_dict(config)
        if not config.get("target_modules"):
            raise Refused("no targets")
        return self.rules(config, modules).plan()


def ruled(
    id: str, sentence: str, story: str, thread: str | None = None
) -> Callable[[type[Rules]], type[Rules]]:
    """Registers an implementation that goes by the class under it."""

    def register(rules: type[Rules]) -> type[Rules]:
        made = type(rules.__name__ + "Implementation", (Ruled,), {"rules": rules})
        made.__module__, made.__qualname__ = rules.__module__, f"{rules.__qualname__}Implementation"
        globals()[made.__name__] = made  # so that a counterexample's program can import it
        wrong(id, "subtle", sentence, story, thread)(made)
        return rules

    return register


@ruled(
    "match-name-begins",
    'A target chooses every last part that begins with it: "q_proj" also chooses "q_proj_2".',
    "startswith on the last part, for variants of a module.",
)
class NameBegins(Rules):
    def ends(self, path: str, name: str) -> bool:
        return path.rsplit(".", 1)[-1].startswith(name) or path.endswith("." + name)


@ruled(
    "match-last-part-only",
    "Only the last part of a target is looked at: the rest of what was named is ignored.",
    "target.split('.')[-1], since most targets have no dot.",
)
class LastPartOnly(Rules):
    def ends(self, path: str, name: str) -> bool:
        return path.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]


@ruled(
    "match-case-ignored",
    "Expressions are matched without regard to case.",
    "re.IGNORECASE, for all-linear's sake.",
)
class CaseIgnored(Rules):
    def check(self) -> None:
        pass

    def ends(self, path: str, name: str) -> bool:
        return path.lower().endswith("." + name.lower())


@ruled(
    "layer-last-number",
    "A module's layer is the last number in its path, which may be an expert's.",
    "A greedy .* in an expression.",
    "huggingface/peft#2908",
)
class LayerLast(Rules):
    def layer(self, path: str) -> int | None:
        if self.config.get("layers_pattern"):
            return super().layer(path)
        found = re.findall(r"\.(\d+)\.", path)
        return int(found[-1]) if found else None


@ruled(
    "layer-first-number",
    "A module's layer is the first number in its path, wherever that is.",
    "Digits are searched for without what stands before them.",
)
class LayerFirst(Rules):
    def layer(self, path: str) -> int | None:
        found = re.search(r"\d+", path)
        return int(found[0]) if found else None


@ruled(
    "layer-prefix",
    "Layer 1 is every layer whose number begins with 1.",
    "startswith(f'model.layers.{n}').",
)
class LayerPrefix(Rules):
    def chosen(self, path: str) -> bool:
        layers = self.config.get("layers_to_transform")
        if isinstance(self.config["target_modules"], str) or layers is None or layers == []:
            return super().chosen(path)
        mine = str(self.layer(path))
        begun = [n for n in ([layers] if isinstance(layers, int) else layers)
                 if mine.startswith(str(n))]  # fmt: skip
        if not begun or mine == "None":
            return False
        return type(self)({**self.config, "layers_to_transform": None}, self.modules).chosen(path)


@ruled(
    "layer-pattern-ignored",
    "layers_pattern is not looked at.",
    "Few models need it.",
)
class LayerPatternIgnored(Rules):
    def layer(self, path: str) -> int | None:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return int(found[1]) if found else None


@ruled(
    "layer-pattern-first-only",
    "Of a list of layers_pattern only the first is used.",
    "A list of one is what people write.",
)
class LayerPatternFirst(Rules):
    def layer(self, path: str) -> int | None:
        patterns = self.config.get("layers_pattern")
        if not patterns or isinstance(patterns, str):
            return super().layer(path)
        return type(self)({**self.config, "layers_pattern": patterns[0]}, self.modules).layer(path)


@ruled(
    "layer-pattern-any-end",
    'layers_pattern "layers" is also found in "my_layers".',
    "The pattern is searched for without the dot in front of it.",
)
class LayerPatternEnd(Rules):
    def layer(self, path: str) -> int | None:
        patterns = self.config.get("layers_pattern")
        for pattern in [patterns] if isinstance(patterns, str) else patterns or []:
            found = re.search(rf"{pattern}\.(\d+)\.", path)
            if found:
                return int(found[1])
        return None if patterns else super().layer(path)


@ruled(
    "layer-of-whole-paths-too",
    "layers_to_transform also drops a module that is named by its whole path.",
    "One filter behind all rules.",
)
class LayerWhole(Rules):
    def chosen(self, path: str) -> bool:
        layers = self.config.get("layers_to_transform")
        chosen = super().chosen(path)
        if isinstance(self.config["target_modules"], str) or layers is None or layers == []:
            return chosen
        return chosen and self.layer(path) in ([layers] if isinstance(layers, int) else layers)


@ruled(
    "pattern-key-is-text",
    "A pattern's key is compared as text, not as an expression.",
    "A dictionary's get().",
)
class KeyIsText(Rules):
    def check(self) -> None:
        super().check()
        self.config = dict(self.config)

    def pattern_matches(self, key: str, path: str) -> bool:
        known = key == path or path.endswith("." + key)
        return known or bool(re.search(r"[*+?(\[^$|\\]", key)) and False

    def plan(self) -> Planned:
        config = dict(self.config)
        for name in ("rank_pattern", "alpha_pattern"):
            config[name] = {
                k: v
                for k, v in (config.get(name) or {}).items()
                if any(self.pattern_matches(k, p) for p in self.modules)
            }
        self.config = config
        return super().plan()


@ruled(
    "pattern-dots-are-dots",
    "A dot in a pattern's key means a dot alone.",
    "The key is escaped before it is compiled: names have dots.",
)
class DotsAreDots(Rules):
    def pattern_matches(self, key: str, path: str) -> bool:
        return super().pattern_matches(key, path) and (
            ".*" in key
            or re.fullmatch(rf"(?:.*\.)?(?:{re.escape(key)})", path) is not None
            or "\\" in key
        )


@ruled(
    "pattern-alternatives-loose",
    "A key with | is put between anchors without a bracket: its ends belong to one side alone.",
    "f'(.*\\\\.)?{key}$', which precedence takes apart.",
)
class AlternativesLoose(Rules):
    def pattern_matches(self, key: str, path: str) -> bool:
        inner = key[1:-1] if key.startswith("(") and "|" in key and key.endswith(")") else key
        return re.match(rf"(?:.*\.)?{inner}$", path) is not None


@ruled(
    "pattern-match-not-full",
    "A pattern's key needs to match only the beginning of what follows a dot.",
    "re.match without the $.",
)
class MatchNotFull(Rules):
    def pattern_matches(self, key: str, path: str) -> bool:
        return re.match(rf"(?:.*\.)?(?:{key})", path) is not None


@ruled(
    "pattern-last-wins",
    "Of several keys that match, the last decides.",
    "A loop without a break.",
)
class LastWins(Rules):
    def value(self, name: str, path: str, default: Any) -> Any:
        for key, value in (self.config.get(name) or {}).items():
            if self.pattern_matches(key, path):
                default = value
        return default


@ruled(
    "pattern-longest-wins",
    "Of several keys that match, the longest decides.",
    "The most specific one, it is thought.",
)
class LongestWins(Rules):
    def value(self, name: str, path: str, default: Any) -> Any:
        keys = [k for k in self.config.get(name) or {} if self.pattern_matches(k, path)]
        return self.config[name][max(keys, key=len)] if keys else default


@ruled(
    "pattern-keys-sorted",
    "Of several keys that match, the first in the alphabet decides.",
    "Settings are written with sort_keys=True.",
)
class KeysSorted(Rules):
    def value(self, name: str, path: str, default: Any) -> Any:
        keys = sorted(k for k in self.config.get(name) or {} if self.pattern_matches(k, path))
        return self.config[name][keys[0]] if keys else default


@ruled(
    "pattern-alpha-by-rank-key",
    "Alpha is taken of alpha_pattern by the key that matched in rank_pattern.",
    "One look-up for both.",
)
class AlphaByRankKey(Rules):
    def value(self, name: str, path: str, default: Any) -> Any:
        ranks = self.config.get("rank_pattern") or {}
        first = next((k for k in ranks if self.pattern_matches(k, path)), None)
        if name == "alpha_pattern" and first is not None:
            return (self.config.get(name) or {}).get(first, default)
        return super().value(name, path, default)


@ruled(
    "pattern-without-rslora",
    "A module that a pattern gives a rank is scaled by alpha / r although use_rslora is set.",
    "The pattern's branch is older than rsLoRA.",
)
class PatternWithoutRslora(Rules):
    def scale(self, r: int, alpha: float) -> float:
        return super().scale(r, alpha) if r == self.config["r"] else alpha / r


@ruled(
    "pattern-rslora-of-default",
    "With use_rslora the root is of the default rank.",
    "sqrt(r) is computed once.",
)
class RsloraOfDefault(Rules):
    def scale(self, r: int, alpha: float) -> float:
        return alpha / math.sqrt(self.config["r"]) if self.config.get("use_rslora") else alpha / r


@ruled(
    "exclude-expression-as-name",
    "exclude_modules as an expression is taken for a name.",
    "A text is a list of one.",
)
class ExcludeAsName(Rules):
    def excluded(self, path: str) -> bool:
        names = self.config.get("exclude_modules")
        if isinstance(names, str):
            return path == names or path.endswith("." + names)
        return super().excluded(path)


@ruled(
    "exclude-searched",
    "exclude_modules as an expression needs to match only a part of the path.",
    "re.search.",
)
class ExcludeSearched(Rules):
    def excluded(self, path: str) -> bool:
        names = self.config.get("exclude_modules")
        if isinstance(names, str) and names:
            return re.search(names, path) is not None
        return super().excluded(path)


@ruled(
    "exclude-not-from-whole-paths",
    "A module that is named by its whole path is adapted although it is excluded.",
    "`if path in target_modules` comes first.",
)
class ExcludeNotWhole(Rules):
    def chosen(self, path: str) -> bool:
        target = self.config["target_modules"]
        return (not isinstance(target, str) and path in target) or super().chosen(path)


@ruled(
    "all-linear-case-matters",
    '"All-Linear" is an expression that matches nothing much.',
    'target == "all-linear".',
)
class AllLinearCase(Rules):
    def chosen(self, path: str) -> bool:
        target = self.config["target_modules"]
        if isinstance(target, str) and target.lower() == "all-linear" != target:
            return False
        return super().chosen(path)


class _Unchecked(Rules):
    """Nothing that matches nothing is refused, of one setting."""

    field = ""

    def check(self) -> None:
        plain = {k: v for k, v in self.config.items() if k != self.field}
        if self.field == "target_modules":
            plain["target_modules"] = ".*"
        type(self).__mro__[2](plain, self.modules).check()  # Rules


@ruled(
    "unmatched-exclusion-accepted",
    "An exclusion that matches nothing is accepted.",
    "It excludes nothing, which looks harmless; it was meant to exclude something.",
)
class ExclusionAccepted(_Unchecked):
    field = "exclude_modules"


@ruled(
    "unmatched-layer-accepted",
    "A layer that does not exist is accepted beside others that do.",
    "Settings of a larger model.",
)
class LayerAccepted(_Unchecked):
    field = "layers_to_transform"


@ruled(
    "unmatched-name-accepted",
    "Of several targets one may match nothing.",
    "An error only where nothing at all matches.",
)
class NameAccepted(_Unchecked):
    field = "target_modules"
