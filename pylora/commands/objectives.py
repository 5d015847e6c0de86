"""What the command line says about objectives before anything is imported that computes."""

from __future__ import annotations

AIM = "What it aims at"

# Those of pylora.training.objectives.choose, which a test compares: --help imports no NumPy.
NAMES = ("sft", "dpo", "ipo", "simpo", "orpo", "kto", "classify", "regress")
