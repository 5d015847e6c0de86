"""Scales in forms that have one number for a whole adapter: folded into B, and got out again.

PEFT has a rank and an alpha for each module. Other forms have one alpha (GGUF, over each rank) or
one scale (MLX); what a module's scale is beyond that is multiplied into its B. By a power of two
that is exact. By another factor each number of B is rounded once, to float32, which moves the
module's update by at most 2^-24 of itself; what rounding took (two bits a number) is kept beside,
so that the B that was can be had again, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.adapters.plan import PlanEntry
from pylora.errors import FileFormatError, UnsupportedError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Carry:
    """What the form says for the whole adapter, and what each module's B is multiplied by."""

    common: float  # the form's alpha or scale
    factors: Mapping[str, float]  # path -> 1 or more

    @property
    def inexact(self) -> tuple[str, ...]:
        """The modules whose factor is no power of two."""
        return tuple(path for path, f in self.factors.items() if math.frexp(f)[0] != 0.5)


def carry(entries: Sequence[PlanEntry], *, over_rank: bool) -> Carry:
    """How the scales of a plan are said by one alpha that each rank divides (`over_rank`), or by
    one scale. The smallest is said, so that no factor is below 1 and no number of B gets lost."""
    said = {e.path: e.scale * e.r if over_rank else e.scale for e in entries}
    if over_rank:  # an alpha that was given as it is: not by way of a quotient
        said |= {e.path: float(e.alpha) for e in entries if e.scale == e.alpha / e.r}
    common = min(said.values())
    return Carry(common, {path: value / common for path, value in said.items()})


def fold(B: Array, factor: float, path: str) -> Array:
    """factor B in float32, rounded once. UnsupportedError where a number becomes infinite."""
    if factor == 1:
        return np.ascontiguousarray(B, np.float32)
    with np.errstate(over="ignore"):
        folded = (B.astype(np.float64) * factor).astype(np.float32)
    if not np.isfinite(folded).all():
        raise UnsupportedError(
            f"{path}: its scale is {factor:g} times the adapter's smallest, and B has numbers that "
            "float32 cannot hold multiplied by that; merge the adapter instead"
        )
    return np.ascontiguousarray(folded)


def low_bits(B: Array, folded: Array, factor: float) -> Array:
    """What `unfold` needs: for each number how far B is from what dividing gives, in steps of
    float32. uint8, four numbers a byte."""
    steps = _steps(B) - _steps(_divided(folded, factor))
    if int(np.abs(steps).max(initial=0)) > 1:
        raise ValueError("a product that was rounded once is more than a step off")
    codes = np.zeros(-(-steps.size // 4) * 4, np.uint8)
    codes[: steps.size] = (steps.reshape(-1) & 3).astype(np.uint8)
    four = codes.reshape(-1, 4)
    packed: Array = four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6
    return packed


def unfold(folded: Array, factor: float, bits: Array | None) -> Array:
    """The B that was folded. `bits` of `low_bits`; None: the factor is a power of two."""
    guess = _divided(folded, factor)
    if bits is None:
        return guess
    if bits.dtype != np.uint8 or bits.shape != (-(-guess.size // 4),):
        raise FileFormatError(f"{bits.size} bytes of low bits for {guess.size} numbers")
    codes = np.stack([bits >> shift & 3 for shift in (0, 2, 4, 6)], axis=1).reshape(-1)
    steps = codes[: guess.size].astype(np.int64)
    steps[steps == 3] = -1
    return _from_steps(_steps(guess) + steps.reshape(guess.shape))


def _divided(folded: Array, factor: float) -> Array:
    return np.ascontiguousarray((folded.astype(np.float64) / factor).astype(np.float32))


def _steps(x: Array) -> Array:
    """float32 numbers as whole ones, so that neighbours differ by 1; -0 is one below 0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF) - 1, bits)


def _from_steps(steps: Array) -> Array:
    bits = np.where(steps < 0, (-(steps + 1)) | 0x80000000, steps)
    return (bits & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
