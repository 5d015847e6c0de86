"""AdamW whose moments are kept in 8 bits: a quarter of the memory of float32's.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", as bitsandbytes' adamw_8bit:
in blocks of 256 a moment is its block's largest absolute value times one of 256 numbers, the
nearest one of a table whose steps are finer the smaller they are. m has a table with signs, v one
without. Arrays of fewer than 4096 elements keep float32 moments. In a step one array's moments at a
time are float32, and the update is AdamW's own.

One thing differs: a v that is not zero never becomes zero, where bitsandbytes rounds it there, and
an element whose gradient stays away then moves by m / eps. NumPy (or the GPU's array library) does
this, each operation rounded once, so a resumed run has the same bits on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.training.config import TrainConfig
from pylora.training.optimizer import Optimizer
from pylora.types import AdamW, Array

BLOCK = 256
SMALLEST = 4096  # elements of an array whose moments are worth keeping so
_DECADES = 7


def table(signed: bool) -> np.ndarray:
    """The 256 numbers in ascending order, float32: 0, 1, and in each decade from 1e-7 .. 1e-6 up to
    0.1 .. 1 the middles of twice as many equal parts as in the one below."""
    found = [0.0, 1.0]
    for i in range(_DECADES):
        parts = 2**i if signed else 2 ** (i + 1)
        edges = np.linspace(np.float32(0.1), np.float32(1), parts + 1, dtype=np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = [float(middle) * 10.0 ** (i - _DECADES + 1) for middle in middles]
        found += [*scaled, *(-x for x in scaled)] if signed else scaled
    return np.sort(np.asarray(found, np.float64)).astype(np.float32)


class Code:
    """One of the two tables, ready to round to."""

    def __init__(self, signed: bool, xp: Any = np) -> None:
        values = table(signed)
        # Between neighbours, in float64, rounded to float32 once.
        middles = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
        # A float32's upper 16 bits say where it lies but for one middle: so the nearest number is
        # a look-up and a comparison, not a search.
        upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
        least = np.where(upper >> 31, upper | np.uint32(0xFFFF), upper).view(np.float32)
        first = np.searchsorted(middles, least).astype(np.int32)
        ends = np.append(middles, np.float32(np.inf))
        self.xp, self.zero = xp, int(np.searchsorted(values, np.float32(0)))
        self.values, self._first = xp.asarray(values), xp.asarray(first)
        self._middles = xp.asarray(ends)

    def nearest(self, x: Array) -> Array:
        """int32 of x's shape: the number of the nearest value of float32 x in [-1, 1], the lower
        one of two that are as near."""
        first = self._first[x.view(np.uint32) >> np.uint32(16)]
        return first + (x > self._middles[first])


@dataclass(eq=False)
class Moment:
    """A moment of one array: uint8 [n], and float32 [blocks]."""

    codes: Array
    largest: Array

    def read(self, code: Code) -> Array:
        """float32 [n]."""
        n, whole = self.codes.size, self.largest.size * BLOCK
        x = code.values[self.codes.astype(np.int32)]
        if whole == n:
            return (x.reshape(-1, BLOCK) * self.largest[:, None]).reshape(-1)
        return x * code.xp.repeat(self.largest, BLOCK)[:n]

    def write(self, x: Array, code: Code) -> None:
        """Rounds float32 x [n] into this, in place."""
        xp, n = code.xp, x.size
        padded = xp.zeros(self.largest.size * BLOCK, np.float32)
        padded[:n] = x
        blocks = padded.reshape(-1, BLOCK)
        largest = xp.abs(blocks).max(axis=1)
        blocks /= xp.where(largest > 0, largest, np.float32(1))[:, None]
        found = code.nearest(padded[:n])
        if code.zero == 0:  # v: see above
            found += (found == 0) & (x > 0)
        self.codes[...], self.largest[...] = found, largest


class Optimizer8(Optimizer):
    """`Optimizer` with 8-bit moments."""

    def __init__(self, ops: Any, parameters: dict[str, Array], config: TrainConfig) -> None:
        super().__init__(ops, {n: p for n, p in parameters.items() if p.size < SMALLEST}, config)
        self.parameters, xp = parameters, ops.xp
        self.codes = {"m": Code(True, xp), "v": Code(False, xp)}
        self.moments: dict[str, dict[str, Moment]] = {"m": {}, "v": {}}
        for name, p in parameters.items():
            for kind, code in self.codes.items() if p.size >= SMALLEST else ():
                codes = xp.full(p.size, code.zero, np.uint8)
                largest = xp.zeros(-(-p.size // BLOCK), np.float32)
                self.moments[kind][name] = Moment(codes, largest)

    def apply(self, updates: Sequence[tuple[str, Array, Array, AdamW]]) -> None:
        """One array after the other, so that one array's moments are float32 at a time."""
        super().apply([u for u in updates if u[0] in self.m])
        for name, p, grad, settings in updates:
            if name in self.m:
                continue
            kept = [self.moments[kind][name] for kind in self.codes]
            m, v = (one.read(code) for one, code in zip(kept, self.codes.values()))
            m, v = m.reshape(p.shape), v.reshape(p.shape)
            self.ops.adamw_steps([(p, grad, m, v, settings)])
            for one, code, x in zip(kept, self.codes.values(), (m, v)):
                one.write(x.reshape(-1), code)

    def _moments(self) -> dict[str, Array]:
        found = super()._moments()
        for kind, named in self.moments.items():
            found |= {f"{kind}.{name}": one.codes for name, one in named.items()}
            found |= {f"{kind}.{name}.largest": one.largest for name, one in named.items()}
        return found


def optimizer_of(ops: Any, parameters: dict[str, Array], config: TrainConfig) -> Optimizer:
    """The optimizer that the settings name."""
    kind = Optimizer8 if config.optimizer == "adamw_8bit" else Optimizer
    return kind(ops, parameters, config)
