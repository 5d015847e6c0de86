"""Stacks of experts in other forms than PEFT's, joined into PEFT's one parameter.

GGUF and MLX keep gate and up of all experts as two adapters; PEFT has one of both together, gate's
rows of B above up's. Names, checks of shapes and files are the forms' own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pylora.adapters.carry import fold
from pylora.formats.base import Array
from pylora.model.config import ModuleSpec


def joined(
    module: str,
    spec: ModuleSpec,
    parts: Sequence[tuple[Array, Array] | None],
    *,
    over_rank: bool = False,
) -> tuple[Array, Array]:
    """A [experts r, k] and B [d, r experts], float32, of parts A [experts, r, k] and
    B [experts, d / parts, r], at least one of which is there.

    Where their A differ, or one is missing, the parts get ranks of their own, beside each other.
    What a scale is divided by (`over_rank`) is then the sum of them, and B makes up for it: by 2,
    which is exact, where the two are equal. Errors: those of `fold`.
    """
    d = spec.d // len(parts)
    there = [part for part in parts if part is not None]
    if len(there) == len(parts) and all(np.array_equal(there[0][0], A) for A, _ in there):
        A, B = there[0][0], np.concatenate([B for _, B in there], axis=1)  # [experts, d, r]
    else:
        A = np.concatenate([A for A, _ in there], axis=1)
        B = np.zeros((spec.experts, spec.d, A.shape[1]), np.float32)
        column = 0
        for i, part in enumerate(parts):
            if part is not None:
                r = part[1].shape[-1]
                factor = A.shape[1] / r if over_rank else 1.0
                B[:, i * d : (i + 1) * d, column : column + r] = fold(part[1], factor, module)
                column += r
    rows = A.reshape(-1, spec.k), B.transpose(1, 2, 0).reshape(spec.d, -1)
    return np.array(rows[0], np.float32, order="C"), np.array(rows[1], np.float32, order="C")
