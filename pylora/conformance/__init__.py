"""The conformance kit: laws that every implementation of LoRA must keep, run against yours.

    pylora conformance mypkg.mylora:Implementation

    from pylora.conformance import LoRAConformance, lora_problems, run

`protocol.py` says what an implementation is. Needs the `conformance` extra (hypothesis).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylora.conformance.laws.law import Law as Law
    from pylora.conformance.laws.registry import LAWS as LAWS
    from pylora.conformance.pytest_class import LoRAConformance as LoRAConformance
    from pylora.conformance.runner import Report as Report
    from pylora.conformance.runner import run as run
    from pylora.conformance.strategies import attention_problems as attention_problems
    from pylora.conformance.strategies import exact_problems as exact_problems
    from pylora.conformance.strategies import lora_problems as lora_problems
    from pylora.conformance.strategies import plans as plans
    from pylora.conformance.strategies import several_adapters as several_adapters
    from pylora.conformance.strategies_model import tiny_transformers as tiny_transformers

_WHERE = {
    "Law": "laws.law",
    "LAWS": "laws.registry",
    "LoRAConformance": "pytest_class",
    "Report": "runner",
    "run": "runner",
    "attention_problems": "strategies",
    "exact_problems": "strategies",
    "lora_problems": "strategies",
    "plans": "strategies",
    "several_adapters": "strategies",
    "tiny_transformers": "strategies_model",
}
__all__ = [
    "LAWS",
    "Law",
    "LoRAConformance",
    "Report",
    "attention_problems",
    "exact_problems",
    "lora_problems",
    "plans",
    "run",
    "several_adapters",
    "tiny_transformers",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
