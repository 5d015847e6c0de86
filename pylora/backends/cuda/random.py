"""Random bits that depend on their number alone (Philox), and dropout by them, on the GPU."""

from __future__ import annotations

import numpy as np

from pylora.backends.cuda.base import Device
from pylora.types import Array, Drop


class Random(Device):
    """`philox` and `dropout`."""

    def philox(self, seed: int, stream: int, first: int, n: int) -> Array:
        out = self.xp.empty(n, np.uint32)
        self.call("philox", seed, stream, first, n, self.to.at(out, "uint32_t *"))
        return out

    def dropout(self, x: Array, drop: Drop | None) -> Array:
        x = self.to.read("x", x, None, None)
        if drop is None or drop.p == 0:
            return x
        y = self.empty(x.shape, x.dtype)
        self.call("dropout", self.to.mat(x), self.to.drop(drop), self.to.mat(y))
        return y
