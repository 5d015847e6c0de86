"""Cross entropy of logits, on the GPU: the loss, its gradient, or both in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.backends.cuda.base import Device
from pylora.types import Array


class Loss(Device):
    """`cross_entropy*`."""

    def _loss_inputs(self, logits: Array, labels: Array) -> tuple[Array, Any]:
        from pylora.reference import IGNORE

        logits = self.to.read("logits", logits, None, None)
        m, n = logits.shape
        if not isinstance(labels, self.xp.ndarray):
            labels = np.asarray(labels)
            self.checked_index("label", labels[labels != IGNORE], n)
            labels = self.index(labels)
        return logits, self._index("labels", labels, m, n)

    def cross_entropy_forward(self, logits: Array, labels: Array) -> tuple[Array, Array]:
        logits, labels = self._loss_inputs(logits, labels)
        nll, lse = self.empty(logits.shape[0]), self.empty(logits.shape[0])
        to = self.to
        self.call(
            "cross_entropy_forward", to.mat(logits), to.at(labels, "int64_t *"), to.at(nll),
            to.at(lse),
        )  # fmt: skip
        return nll, lse

    def cross_entropy_backward(
        self, logits: Array, labels: Array, lse: Array, weight: Array, overwrite: bool = False
    ) -> Array:
        to = self.to
        logits, labels = self._loss_inputs(logits, labels)
        m = logits.shape[0]
        lse = to.vector("lse", lse, m)
        weight = to.vector("weight", self.place(weight), m)
        d = logits if overwrite else self.empty(logits.shape)
        self.call(
            "cross_entropy_backward", to.mat(logits), to.at(labels, "int64_t *"), to.at(lse),
            to.at(weight), to.mat(d),
        )  # fmt: skip
        return d

    def cross_entropy(
        self, logits: Array, labels: Array, weight: Array, overwrite: bool = False
    ) -> tuple[Array, Array, Array]:
        to = self.to
        logits, labels = self._loss_inputs(logits, labels)
        m = logits.shape[0]
        weight = to.vector("weight", self.place(weight), m)
        nll, lse = self.empty(m), self.empty(m)
        d = logits if overwrite else self.empty(logits.shape)
        self.call(
            "cross_entropy", to.mat(logits), to.at(labels, "int64_t *"), to.at(weight),
            to.at(nll), to.at(lse), to.mat(d),
        )  # fmt: skip
        return nll, lse, d
