"""An adapter as it was before it was written in another form, by the settings that are kept beside.

The form's own tensors and numbers count: where the kept settings do not give exactly these, they
are passed over, and the adapter is read as one that another program wrote.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pylora.adapters.carry import Carry, fold, unfold
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import Plan
from pylora.errors import PlanError, UnsupportedError
from pylora.formats.base import Array
from pylora.types import LoRA

Read = tuple[LoraConfig, Plan, dict[str, LoRA]]  # what `read` of a form gives


def check_modules(where: str, plan: Plan, parts: Mapping[str, object]) -> None:
    """PlanError unless the tensors are of the modules that the kept settings name."""
    named = {e.path for e in plan}
    for path in named ^ set(parts):
        what = "there are no tensors of" if path in named else "it does not name"
        raise PlanError(f"{where} and the tensors differ: {what} {path}")


def restored(
    config: LoraConfig,
    plan: Plan,
    parts: Mapping[str, tuple[Array, Array]],
    folded: Carry,
    common: float,
    bits: Array | None,
) -> Read | None:
    """The adapter of `plan` whose B were folded into those of `parts`; None where that does not
    give these numbers."""
    if np.float32(folded.common) != np.float32(common):
        return None
    out, used = {}, 0
    for e in plan:
        A, B = parts[e.path]
        if A.shape != (e.r * e.experts, e.k) or B.shape != (e.d, e.r * e.experts):
            return None
        own = None
        if e.path in folded.inexact:
            size = -(-B.size // 4)
            own = np.zeros(0, np.uint8) if bits is None else bits[used : used + size]
            used += size
            if own.dtype != np.uint8 or own.size != size:
                return None
        was = unfold(B, folded.factors[e.path], own)
        try:
            again = fold(was, folded.factors[e.path], e.path)
        except UnsupportedError:
            return None
        if again.tobytes() != np.ascontiguousarray(B).tobytes():
            return None
        zero = np.zeros(e.d, np.float32) if e.lora_bias else None
        out[e.path] = LoRA(A, was, e.scale, float(config.lora_dropout), zero)
    return None if used != (0 if bits is None else bits.size) else (config, plan, out)
