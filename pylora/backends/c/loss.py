"""Cross entropy of logits, on the C core: the loss, its gradient, or both in one pass."""

from __future__ import annotations

import numpy as np

from pylora.backends._core import lib
from pylora.backends.c.base import Core
from pylora.backends.c.marshal import at, check, ints, mat, read
from pylora.types import Array


class Loss(Core):
    """`cross_entropy*`."""

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        nll, lse = np.empty(m, np.float32), np.empty(m, np.float32)
        status = lib.pylora_cross_entropy_forward(
            mat(logits), at(labels, "int64_t *"), at(nll), at(lse)
        )
        check(status, "cross_entropy_forward")
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> np.ndarray:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        lse = np.ascontiguousarray(read("lse", lse, m))
        weight = np.ascontiguousarray(read("weight", weight, m))
        d = logits if overwrite and logits.flags.writeable else self.empty(logits.shape)
        status = lib.pylora_cross_entropy_backward(
            mat(logits), at(labels, "int64_t *"), at(lse), at(weight), mat(d)
        )
        check(status, "cross_entropy_backward")
        return d

    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits = read("logits", logits, None, None)
        m = logits.shape[0]
        labels = ints("labels", labels, m)
        weight = np.ascontiguousarray(read("weight", weight, m))
        nll, lse = np.empty(m, np.float32), np.empty(m, np.float32)
        d = logits if overwrite and logits.flags.writeable else self.empty(logits.shape)
        status = lib.pylora_cross_entropy(
            mat(logits), at(labels, "int64_t *"), at(weight), at(nll), at(lse), mat(d)
        )
        check(status, "cross_entropy")
        return nll, lse, d
