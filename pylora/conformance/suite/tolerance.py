"""How far a right answer may be off: the one place where that is derived.

Let an engine round each number that it makes by a share of at most `element` of itself, or (blocks
of quantized numbers) by at most `block` of the largest number of its block of 32. To first order
the log-probabilities then move by a multiple of it that is a property of model and adapter: their
sensitivity. It is measured in float64, by moving every weight, every number of the adapter and
every result of every operation at random by that share (2^-14, where the answer is linear in it),
a few times; what was moved most counts. So

    tolerance = SAFETY (sensitivity.element * element + sensitivity.block * block) + FLOOR

SAFETY is for what random moves miss: roundings inside an operation, and the unluckiest case. FLOOR
is for logarithms taken in float32 and for decimals that are cut when numbers are printed.

A rounding to nearest in a format of p bits is off by at most 2^-p of itself. In float32 sums are
rounded term by term: of up to 256 terms at random, 16 roundings' worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pylora.conformance.suite.adapters import Meaning
from pylora.conformance.suite.answers import Answer, Moved, answer
from pylora.conformance.suite.bases import Base
from pylora.errors import ConfigError

SAFETY, FLOOR = 2.5, 2e-4
_SIZE, _TRIES, _LIKELY = 2.0**-14, 3, 20


@dataclass(frozen=True)
class Rounding:
    """What a precision rounds: shares of each number, and of the largest of its block."""

    element: float
    block: float = 0.0


_FP32 = 16 * 2.0**-24
PRECISIONS: dict[str, Rounding] = {
    "fp32": Rounding(_FP32),
    "tf32": Rounding(2.0**-11),
    "fp16": Rounding(2.0**-11),
    "bf16": Rounding(2.0**-8),
    "q8_0": Rounding(2.0**-11, 0.5 / 127),
    "int8": Rounding(2.0**-11, 0.5 / 127),
    "fp8": Rounding(2.0**-4),
    "int4": Rounding(2.0**-11, 0.5 / 7.5),
}


@dataclass(frozen=True)
class Sensitivity:
    """By how many times of a rounding's size the log-probabilities move."""

    element: float
    block: float

    def tolerance(self, precision: str) -> float:
        """The largest error of a right answer in this precision; ConfigError for an unknown one."""
        if precision not in PRECISIONS:
            raise ConfigError(
                f"there is no precision {precision!r}; there are {', '.join(PRECISIONS)}"
            )
        r = PRECISIONS[precision]
        return SAFETY * (self.element * r.element + self.block * r.block) + FLOOR


def sensitivity(base: Base, meaning: Meaning, right: Answer) -> Sensitivity:
    """Measured for this model and adapter."""
    most = []
    for block in (False, True):
        moves = [Moved(_SIZE, block, seed) for seed in range(_TRIES)]
        most.append(max(_moved(right, answer(base, meaning, ops=ops)) for ops in moves) / _SIZE)
    return Sensitivity(*(float(f"{m:.3g}") for m in most))


def _moved(right: Answer, other: Answer) -> float:
    """The largest difference of what engines show: the prompt's tokens and the likely next ones."""
    most = [np.abs(a - b).max() for a, b in zip(right.prompt, other.prompt)]
    for a, b in zip(right.next, other.next):
        likely = np.argsort(-a)[:_LIKELY]
        most.append(np.abs(a - b)[likely].max())
    return float(max(most))
