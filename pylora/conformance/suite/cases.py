"""The adapters of the suite, each for one rule: a table of settings, and nothing computed.

A case's fields are those of PEFT's adapter_config.json. `of` says which bases have it: a rule about
biases needs modules that have some, one about a tied head a base that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pylora.conformance.suite.bases import Base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def _any(base: Base) -> bool:
    return True


def _untied(base: Base) -> bool:
    return not base.tied


def _biased(base: Base) -> bool:
    return not base.tied and any(spec.bias for spec in base.config.modules().values())


@dataclass(frozen=True)
class Case:
    """One adapter: the rule that it is for, its settings, how its tensors are stored."""

    name: str
    rule: str
    config: dict[str, Any]
    of: Callable[[Base], bool] = _untied
    dtype: str = "f32"
    draw: str = ""  # cases with the same word have the same A and B
    allowed: str = ""  # why an engine may refuse it, where that is no fault
    extra: dict[str, Any] = field(default_factory=dict)  # settings that pylora itself refuses


def _targets(*names: str, r: int = 4, alpha: float = 24, **more: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": alpha, "target_modules": list(names), **more}


_RARE = "few engines have it"
CASES: tuple[Case, ...] = (
    Case("alpha", "the scale is alpha / r", _targets(*ATTENTION), _any),
    Case(
        "second",
        "as `alpha`, other numbers and another scale",
        _targets(*ATTENTION, r=8, alpha=16),
        _any,
    ),
    Case(
        "rslora",
        "with use_rslora the scale is alpha / sqrt(r)",
        _targets(*ATTENTION, r=16, alpha=8, use_rslora=True),
    ),
    Case(
        "rank-pattern",
        "rank_pattern gives a module its own r, and with it its own scale",
        _targets(*ATTENTION, r=16, alpha=8, rank_pattern={"q_proj": 2, "o_proj": 4}),
        allowed="one rank for all modules",
    ),
    Case(
        "alpha-pattern",
        "alpha_pattern gives a module its own alpha",
        _targets(*ATTENTION, r=4, alpha=8, alpha_pattern={"v_proj": 40, "o_proj": 2}),
        allowed="one alpha for all modules",
    ),
    Case(
        "layer-pattern",
        "a pattern may name one layer's module",
        _targets(
            *ATTENTION,
            r=4,
            alpha=8,
            rank_pattern={r"layers\.1\.self_attn\.v_proj": 16},
            alpha_pattern={r"layers\.1\.self_attn\.v_proj": 160},
        ),
        allowed="one rank and alpha for all modules",
    ),
    Case(
        "embedding",
        "an adapter on embed_tokens changes what goes in",
        _targets("embed_tokens", "v_proj", "o_proj"),
        _any,
        allowed=_RARE,
    ),
    Case(
        "head",
        "an adapter on lm_head changes what comes out, and that alone if the head is tied",
        _targets("lm_head", "v_proj", "o_proj"),
        _any,
        allowed=_RARE,
    ),
    Case(
        "bias-all",
        "with bias = all the file's biases replace those of every module",
        _targets("q_proj", "v_proj", bias="all"),
        _biased,
        allowed=_RARE,
    ),
    Case(
        "bias-lora-only",
        "with bias = lora_only the file's biases replace those of the adapted modules",
        _targets("q_proj", "v_proj", bias="lora_only"),
        _biased,
        allowed=_RARE,
    ),
    Case(
        "lora-bias",
        "with lora_bias B has a bias, which is scaled as B is",
        _targets("v_proj", "o_proj", "down_proj", lora_bias=True),
        allowed=_RARE,
    ),
    Case(
        "layers",
        "layers_to_transform adapts the layers that it names, and no others",
        _targets(*ATTENTION, "up_proj", layers_to_transform=[1]),
    ),
    Case(
        "regex",
        "target_modules may be a regular expression for whole paths",
        {
            "r": 4,
            "lora_alpha": 24,
            "target_modules": r"model\.layers\.[02]\.(self_attn\.v_proj|mlp\.(up|down)_proj)",
        },
    ),
    Case(
        "dora",
        "with use_dora each row of W + s B A is brought to the length that the file gives it",
        _targets(*ATTENTION, "down_proj"),
        allowed=_RARE,
        extra={"use_dora": True},
    ),
    Case(
        "modules-to-save",
        "a module of modules_to_save is replaced by the file's",
        _targets("v_proj", "o_proj"),
        allowed=_RARE,
        extra={"modules_to_save": ["lm_head"]},
    ),
    Case("rank-1", "a rank of 1", _targets(*ATTENTION, r=1, alpha=3)),
    Case(
        "rank-256",
        "a rank of 256, above both dimensions of the modules",
        _targets("v_proj", "o_proj", r=256, alpha=64),
        allowed="a limit of the rank",
    ),
    Case("float16", "tensors stored as float16", _targets(*ATTENTION), dtype="f16", draw="16 bits"),
    Case("bfloat16", "tensors stored as bfloat16", _targets(*ATTENTION), dtype="bf16"),
    Case(
        "all-linear",
        "all-linear is every linear module but the head",
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        _any,
    ),
    Case("mlp-only", "an adapter that leaves attention alone", _targets(*MLP)),
    Case("one-module", "an adapter on one kind of module", _targets("k_proj", r=2, alpha=10)),
)
