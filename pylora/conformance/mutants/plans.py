"""Which modules an adapter is for, and with what rank and scale."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.registry import wrong

Modules = Mapping[str, tuple[int, int]]
Planned = dict[str, tuple[int, float, float]]


def is_or_ends(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def targets(config: Mapping[str, Any]) -> list[str]:
    """target_modules, if it is a list; otherwise nothing."""
    names = config.get("target_modules")
    return [] if names is None or isinstance(names, str) else list(names)


def chosen(config: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """The settings with these modules as its targets, each by its whole path."""
    return {**config, "target_modules": paths}


@wrong(
    "plan-unknown-target-skipped",
    "subtle",
    "A target that matches no module is skipped in silence.",
    "Only a plan in which nothing matches is an error; a mistyped name trains less.",
    "huggingface/peft#1959",
)
class UnknownTargetSkipped(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        names = targets(config)
        known = [n for n in names if any(is_or_ends(path, n) for path in modules)]
        return super().plan({**config, "target_modules": known} if known else config, modules)


@wrong(
    "plan-nothing-matches-accepted",
    "gross",
    "A plan of no modules is accepted.",
    "The adapter loads, is listed, and the base answers.",
    "vllm-project/vllm#55193",
)
class NothingMatchesAccepted(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        target = config.get("target_modules")
        if isinstance(target, str) and target.lower() != "all-linear":
            if not any(re.fullmatch(target, path) for path in modules):
                return {}
        names = targets(config)
        if names and not any(is_or_ends(path, n) for path in modules for n in names):
            return {}
        return super().plan(config, modules)


@wrong(
    "plan-last-target-forgotten",
    "gross",
    "Of several targets the last one is left out.",
    "A table of supported modules that lacks a name: those layers stay frozen.",
    "huggingface/peft#3554",
)
class LastTargetForgotten(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        full = super().plan(config, modules)
        names = targets(config)
        if len(names) < 2:
            return full
        return {p: e for p, e in full.items() if any(is_or_ends(p, n) for n in names[:-1])}


@wrong(
    "plan-regex-searched",
    "subtle",
    "A regular expression needs to match only a part of the path.",
    "re.search or re.match in place of re.fullmatch.",
)
class RegexSearched(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        target = config.get("target_modules")
        if isinstance(target, str) and target.lower() != "all-linear":
            found = [path for path in modules if re.search(target, path)]
            return super().plan(chosen(config, found) if found else config, modules)
        return super().plan(config, modules)


@wrong(
    "plan-suffix-without-dot",
    "subtle",
    'A name chooses every path that ends in it: "proj" also chooses "q_proj".',
    "endswith without the dot; or `in`, which takes linear_q for linear_query.",
    "NVIDIA-NeMo/Megatron-Bridge#1747",
)
class SuffixWithoutDot(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        names = targets(config)
        if not names:
            return super().plan(config, modules)
        super().plan(config, modules)  # what is wrong with the settings is still said
        found = [path for path in modules if any(path.endswith(n) for n in names)]
        return super().plan(chosen(config, found), modules)


@wrong(
    "plan-exclusion-ignored",
    "gross",
    "exclude_modules is not looked at.",
    "A setting that is newer than the reader.",
)
class ExclusionIgnored(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        return super().plan({k: v for k, v in config.items() if k != "exclude_modules"}, modules)


@wrong(
    "plan-all-linear-with-head",
    "subtle",
    '"all-linear" includes lm_head.',
    "It is a linear layer, after all.",
)
class AllLinearWithHead(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        target = config.get("target_modules")
        if isinstance(target, str) and target.lower() == "all-linear":
            return super().plan(chosen(config, list(modules)), modules)
        return super().plan(config, modules)


@wrong(
    "plan-alpha-pattern-ignored",
    "gross",
    "alpha_pattern is not looked at.",
    "The settings are rebuilt field by field, and the patterns are not among them.",
    "MakazhanAlpamys/Soup#803",
)
class AlphaPatternIgnored(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        super().plan(config, modules)
        return super().plan({k: v for k, v in config.items() if k != "alpha_pattern"}, modules)


@wrong(
    "plan-rank-pattern-ignored",
    "gross",
    "rank_pattern is not looked at.",
    "One rank for all is the common case.",
    "MakazhanAlpamys/Soup#803",
)
class RankPatternIgnored(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        super().plan(config, modules)
        return super().plan({k: v for k, v in config.items() if k != "rank_pattern"}, modules)


@wrong(
    "plan-scale-of-first-rank",
    "subtle",
    "The scale is alpha / r with the default r, also where rank_pattern gives another.",
    "alpha and r were taken from the first entry and never looked at again.",
    "huggingface/diffusers#14409",
)
class ScaleOfDefaultRank(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        r = config.get("r", 8)
        divisor = math.sqrt(r) if config.get("use_rslora") else r
        plan = super().plan(config, modules)
        return {path: (rank, alpha, alpha / divisor) for path, (rank, alpha, _) in plan.items()}


@wrong(
    "plan-rslora-dropped",
    "gross",
    "use_rslora is not looked at.",
    "The adapter loads without any error and is sqrt(r) times too weak.",
    "sgl-project/sglang#40835",
)
class PlanRsloraDropped(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        return super().plan({**config, "use_rslora": False}, modules)


@wrong(
    "plan-pattern-key-searched",
    "subtle",
    "A pattern's key needs to occur anywhere in the path: layers.1 also means layers.11.",
    "`if key in path`.",
)
class PatternKeySearched(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        plan = super().plan(config, modules)
        changed = dict(config)
        for name in ("rank_pattern", "alpha_pattern"):
            spread: dict[str, Any] = {}
            for path in plan:
                for key, value in (config.get(name) or {}).items():
                    if re.search(key, path):
                        spread.setdefault(re.escape(path), value)
            changed[name] = spread
        return super().plan(changed, modules)


@wrong(
    "plan-unmatched-pattern-accepted",
    "subtle",
    "A pattern's key that matches no target is skipped in silence.",
    "The rank that was asked for is not used, and no one says so.",
    "huggingface/peft#3582",
)
class UnmatchedPatternAccepted(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        changed = dict(config)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = config.get(name) or {}
            changed[name] = {
                key: value
                for key, value in pattern.items()
                if any(re.match(rf"(.*\.)?({key})$", path) for path in modules)
            }
        return super().plan(changed, modules)


@wrong(
    "plan-bad-number-mended",
    "subtle",
    "A rank that is no positive integer becomes one, and an alpha of NaN becomes 1.",
    "max(1, int(r)), so that nothing divides by zero.",
)
class BadNumberMended(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
        mended = {"r": max(1, int(r)), "lora_alpha": 1 if math.isnan(alpha) else alpha}
        return super().plan({**config, **mended}, modules)


@wrong(
    "plan-other-method-as-lora",
    "subtle",
    "A setting that is not known is dropped: a QA-LoRA adapter is run as plain LoRA.",
    "Only the fields that the program knows are copied from the file.",
)
class OtherMethodAsLora(Correct):
    known = frozenset(
        "r lora_alpha target_modules exclude_modules layers_to_transform use_rslora rank_pattern "
        "alpha_pattern".split()
    )

    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        return super().plan({k: v for k, v in config.items() if k in self.known}, modules)


@wrong(
    "plan-unknown-layer-skipped",
    "subtle",
    "A layer that the model does not have is skipped in silence.",
    "Settings of a larger model of the same family.",
)
class UnknownLayerSkipped(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        layers = config.get("layers_to_transform")
        if not layers:
            return super().plan(config, modules)
        there = [n for n in layers if any(f".{n}." in path for path in modules)]
        return super().plan({**config, "layers_to_transform": there or None}, modules)


@wrong(
    "plan-layers-ignored",
    "gross",
    "layers_to_transform is not looked at.",
    "A setting that few files have.",
)
class LayersIgnored(Correct):
    def plan(self, config: dict[str, Any], modules: Modules) -> Planned:
        super().plan(config, modules)
        return super().plan({**config, "layers_to_transform": None}, modules)
