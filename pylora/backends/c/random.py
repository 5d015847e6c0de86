"""Random bits that depend on their number alone (Philox), and dropout by them, on the C core."""

from __future__ import annotations

import numpy as np

from pylora.backends._core import lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import at, check, drop_struct, mat, read
from pylora.types import Array, Drop


class Random(Core):
    """`philox` and `dropout`."""

    def philox(self, seed: int, stream: int, first: int, n: int) -> np.ndarray:
        out: np.ndarray = np.empty(n, np.uint32)
        check(lib.pylora_philox(seed, stream, first, n, at(out, "uint32_t *")), "philox")
        return out

    def dropout(self, x: Array, drop: Drop | None) -> np.ndarray:
        x = read("x", x, None, None)
        if drop is None or drop.p == 0:
            return np.asarray(x)
        y = self.empty(x.shape)
        check(lib.pylora_dropout(mat(x), drop_struct(drop), mat(y)), "dropout")
        return y
