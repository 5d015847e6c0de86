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
    from pylora.conformance.problems.layers import attention_problems as attention_problems
    from pylora.conformance.problems.layers import exact_problems as exact_problems
    from pylora.conformance.problems.layers import lora_problems as lora_problems
    from pylora.conformance.problems.layers import plans as plans
    from pylora.conformance.problems.layers import several_adapters as several_adapters
    from pylora.conformance.problems.models import tiny_transformers as tiny_transformers
    from pylora.conformance.running.pytest_class import LoRAConformance as LoRAConformance
    from pylora.conformance.running.runner import Report as Report
    from pylora.conformance.running.runner import run as run

_WHERE = {
    "Law": "laws.law",
    "LAWS": "laws.registry",
    "LoRAConformance": "running.pytest_class",
    "Report": "running.runner",
    "run": "running.runner",
    "attention_problems": "problems.layers",
    "exact_problems": "problems.layers",
    "lora_problems": "problems.layers",
    "plans": "problems.layers",
    "several_adapters": "problems.layers",
    "tiny_transformers": "problems.models",
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
