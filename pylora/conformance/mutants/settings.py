"""Settings that are impossible, unknown or of another method, and are taken all the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws.rules import Planned, Refused
from pylora.conformance.mutants.matching import Ruled
from pylora.conformance.mutants.registry import wrong

Modules = Mapping[str, tuple[int, int]]


class _Mended(Ruled):
    """Bad numbers and settings are made good ones before anybody sees them."""


@wrong(
    "number-infinity-accepted",
    "subtle",
    "An alpha that is infinite becomes 1; NaN is refused.",
    "A check for NaN alone: x != x.",
)
class InfinityAccepted(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        alpha = config.get("lora_alpha")
        if isinstance(alpha, float) and math.isinf(alpha):
            return {**config, "lora_alpha": 1.0}
        return config


@wrong(
    "number-true-is-one",
    "subtle",
    "A rank of true is 1.",
    "isinstance(True, int) holds.",
)
class TrueIsOne(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: int(v) if v is True and k in ("r", "lora_alpha") else v
                for k, v in config.items()}  # fmt: skip


@wrong(
    "number-text-accepted",
    "subtle",
    "A number that is written as a text is read.",
    "int() and float() take texts.",
)
class TextAccepted(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: float(v) if isinstance(v, str) and k == "lora_alpha" else v
                for k, v in config.items()}  # fmt: skip


@wrong(
    "number-in-pattern-unchecked",
    "subtle",
    "Numbers in patterns are not checked: a rank of 0 there counts as the default.",
    "`pattern.get(key) or default`.",
)
class PatternUnchecked(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        out = dict(config)
        for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = config.get(name)
            if isinstance(pattern, dict):
                out[name] = {
                    k: v
                    if type(v) in (int, float)
                    and v == v
                    and 0 < v < 1e30
                    and (v == int(v) or name != "rank_pattern")
                    else config[default]
                    for k, v in pattern.items()
                }
        return out


@wrong(
    "setting-unknown-dropped",
    "subtle",
    "A setting whose name nobody knows is dropped; known methods are refused.",
    "dataclass fields are filtered by name.",
)
class UnknownDropped(_Mended):
    unknown = (
        "rslora",
        "rank",
        "alpha",
        "lora_alpha_pattern",
        "scaling",
        "no_such_field",
        "No_such",
    )

    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in self.unknown}


@wrong(
    "setting-rslora-truthy",
    "subtle",
    'use_rslora of "false" is true.',
    "if config['use_rslora']: any string is true.",
)
class RsloraTruthy(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "use_rslora": bool(config.get("use_rslora"))}


@wrong(
    "setting-other-peft-type",
    "subtle",
    "peft_type is not looked at: a LoHa adapter is read as LoRA.",
    "Whoever calls the LoRA reader has a LoRA file.",
)
class OtherPeftType(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k != "peft_type"}


@wrong(
    "setting-empty-is-none-chosen",
    "subtle",
    "layers_to_transform = [] keeps no layer, where it should keep all.",
    "`is not None` in place of a look inside.",
)
class EmptyIsNone(_Mended):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        if config.get("layers_to_transform") == []:
            raise Refused("no layer is left")
        return config


@wrong(
    "init-pissa-as-plain",
    "subtle",
    "init_lora_weights is not looked at: PiSSA's adapters are read as plain ones.",
    "Initial values do not matter once there are trained ones, it is thought.",
)
class PissaAsPlain(Ruled):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k != "init_lora_weights"}


@wrong(
    "init-pissa-by-name",
    "subtle",
    '"pissa" is refused, "pissa_niter_4" is not.',
    "The number of iterations is part of the name.",
)
class PissaByName(Ruled):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        how = config.get("init_lora_weights")
        return {**config, "init_lora_weights": True} if str(how).startswith("pissa_") else config


@wrong(
    "init-loftq-as-plain",
    "subtle",
    "LoftQ is taken for a plain adapter: the base is quantized otherwise here, or not at all.",
    "The adapter's file looks like any other.",
)
class LoftqAsPlain(Ruled):
    def mended(self, config: dict[str, Any]) -> dict[str, Any]:
        how = config.get("init_lora_weights")
        return {**config, "init_lora_weights": True} if how == "loftq" else config


class _SeesAll(Correct):
    """A plan whose modules that cannot take LoRA have a size of (2, 2), as any other has."""

    def plan(self, config: dict[str, Any], modules: Mapping[str, Any]) -> Planned:
        odd = {path for path, size in modules.items() if size is None}
        found = super().plan(config, {p: s or (2, 2) for p, s in modules.items()})
        return self.kept(found, odd, config)

    def kept(self, found: Planned, odd: set[str], config: dict[str, Any]) -> Planned:
        return {path: entry for path, entry in found.items() if path not in odd}


@wrong(
    "plan-no-lora-skipped",
    "subtle",
    "A module that cannot take LoRA is skipped in silence where a target names it.",
    "isinstance(module, Linear) in the loop.",
)
class NoLoraSkipped(_SeesAll):
    pass


@wrong(
    "plan-no-lora-adapted",
    "subtle",
    "A module that cannot take LoRA is planned like any other.",
    "The plan knows paths alone.",
)
class NoLoraAdapted(_SeesAll):
    def kept(self, found: Planned, odd: set[str], config: dict[str, Any]) -> Planned:
        return found


@wrong(
    "plan-no-lora-by-all-linear",
    "subtle",
    '"all-linear" chooses modules that are not linear.',
    "All that has a weight.",
)
class NoLoraByAllLinear(_SeesAll):
    def kept(self, found: Planned, odd: set[str], config: dict[str, Any]) -> Planned:
        if isinstance(config["target_modules"], str):
            return found
        if odd & set(found):
            raise Refused(f"{odd} cannot take LoRA")
        return found
