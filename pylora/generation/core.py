"""The C core's way to choose tokens, where there is a C core: pylora works without one, slowly."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(1)
def _compiled() -> Any:
    try:
        return importlib.import_module("pylora.backends.c.sampling")
    except ImportError:
        return None


def core_for(logits: np.ndarray) -> Any:
    """`pylora.backends.c.sampling`; None where it is not built, and for logits in float64."""
    return _compiled() if logits.dtype == np.float32 else None
