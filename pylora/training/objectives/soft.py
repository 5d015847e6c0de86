"""The top of distillation: what a teacher says of the next token, its k likeliest and all others.

Of each row the teacher's k likeliest tokens are known with their probabilities p, and what is left,
the tail. With q the student's, both at temperature T, and the tail one outcome more:

    KL = Σ_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail)
    dKL/dlogit = (q - p) / T  at the k tokens,   q (1 - p_tail / q_tail) / T  at all others

The KL of k + 1 outcomes is never above that of the whole distributions. A tail counts as 1e-7 at
least, which is where float32 ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.model.head import HeadCache
from pylora.model.linear import DropKey, Grads
from pylora.types import Array, brief

FLOOR = 1e-7  # of a tail's probability


@dataclass(frozen=True, eq=False)
class Said:
    """What a teacher said of n rows: ids int64 [n, k] and logp float32 [n, k], likeliest first."""

    __repr__ = brief

    ids: np.ndarray
    logp: np.ndarray


def in_chunks(
    model: Any, x: Array, rows: np.ndarray, drop: DropKey | None, work: Callable[..., None]
) -> None:
    """work(a, b, logits, head's cache) of the rows a to b of `rows`, as many as the head takes."""
    ops, step = model.ops, model.ops.head_rows
    for a in range(0, rows.size, step):
        b = min(a + step, rows.size)
        logits, cache = model.head.forward(
            ops.take_rows(x, ops.xp.asarray(rows[a:b])), drop, first_row=a
        )
        work(a, b, logits, cache)


class TeacherTop:
    """Finds what a model says of some rows."""

    def __init__(self, rows: np.ndarray, k: int, temperature: float) -> None:
        self.rows, self.k, self.temperature = rows, k, temperature
        self.said = Said(np.empty((rows.size, k), np.int64), np.empty((rows.size, k), np.float32))

    def forward(self, model: Any, x: Array, drop: DropKey | None) -> None:
        """Sets `said`. Of equal logits the lower id comes first."""
        in_chunks(model, x, self.rows, drop, lambda a, b, z, _: self._take(model, a, b, z))

    def _take(self, model: Any, a: int, b: int, logits: Array) -> None:
        for i, row in enumerate(model.ops.to_numpy(logits), a):
            wide = row.astype(np.float64) / self.temperature
            least = np.partition(wide, -self.k)[-self.k]
            among = np.flatnonzero(wide >= least)
            best = among[np.lexsort((among, -wide[among]))][: self.k]
            top = wide.max()
            log_sum = top + math.log(float(np.exp(wide - top).sum()))
            self.said.ids[i], self.said.logp[i] = best, wide[best] - log_sum

    def backward(self, *_: Any) -> None:
        """A teacher is not trained."""
        raise NotImplementedError


class SoftTop:
    """The loss of some rows: (1 - mix) T² KL + mix times the label's nll; each weighs `weight`."""

    def __init__(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        said: Said,
        *,
        temperature: float,
        mix: float,
        weight: float | None,
    ) -> None:
        """rows, labels int64 [n]; weight None: no gradient is asked for."""
        self.rows, self.labels, self.said = rows, labels, said
        self.temperature, self.mix, self.weight = temperature, mix, weight
        self.loss, self.kl = np.zeros(rows.size), np.zeros(rows.size)
        self.agrees = np.zeros(rows.size, bool)  # the likeliest token is the teacher's

    def forward(self, model: Any, x: Array, drop: DropKey | None) -> None:
        """Sets `loss`, `kl` and `agrees`, where no gradient is asked for; else backward does."""
        if self.weight is None:
            in_chunks(model, x, self.rows, drop, lambda a, b, z, _: self._rows(model, a, b, z))

    def backward(
        self, model: Any, x: Array, drop: DropKey | None, need_dx: bool, grads: Grads
    ) -> Array | None:
        """dx [m, hidden]."""
        ops = model.ops
        dx = ops.zeros(x.shape, model.dtype) if need_dx else None

        def work(a: int, b: int, logits: Array, cache: HeadCache) -> None:
            dlogits = self._rows(model, a, b, logits)
            some = model.head.backward(dlogits, cache, grads, need_dx)
            if dx is not None:
                ops.put_rows(dx, ops.xp.asarray(self.rows[a:b]), some)

        in_chunks(model, x, self.rows, drop, work)
        return dx

    def _rows(self, model: Any, a: int, b: int, logits: Array) -> Array:
        """Sets the losses of these rows; the gradient of their logits where there is a weight."""
        ops, xp, T, n = model.ops, model.ops.xp, self.temperature, b - a
        real = np.empty(0, model.dtype).real.dtype
        labels, ids = xp.asarray(self.labels[a:b]), self.said.ids[a:b]
        at = xp.arange(n)[:, None], xp.asarray(ids)
        self.agrees[a:b] = ops.to_numpy(logits.argmax(axis=1)) == ids[:, 0]
        cooled = logits / real.type(T) if T != 1 else logits
        first = at[1][:, 0]
        zeros = xp.zeros(n, real)
        if self.weight is None:
            nll, _ = ops.cross_entropy_forward(cooled, first)
            q = None
        else:
            nll, _, q = ops.cross_entropy(cooled, first, zeros + 1)  # q - 1 at `first`
            q[at[0][:, 0], first] += 1
        known = ops.to_numpy(cooled[at]).astype(np.float64)
        log_q = known - known[:, :1] - ops.to_numpy(nll).astype(np.float64)[:, None]
        outer, inner = np.empty(n), np.empty(ids.shape)
        for i in range(n):
            self.kl[a + i], outer[i], inner[i] = divergence(self.said.logp[a + i], log_q[i])
        hard = np.zeros(n)
        scale = T * T * (1 - self.mix)
        if self.mix:
            hard = ops.to_numpy(ops.cross_entropy_forward(logits, labels)[0]).astype(np.float64)
        self.loss[a:b] = scale * self.kl[a:b] + self.mix * hard
        if q is None or self.weight is None:
            return None
        factor = self.weight * scale / T
        d = q * xp.asarray((factor * outer).astype(real))[:, None]
        d[at] = xp.asarray((factor * inner).astype(real))
        if self.mix:
            soft = zeros + real.type(self.weight * self.mix)
            d += ops.cross_entropy(logits, labels, soft)[2]
        return d


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> tuple[float, float, np.ndarray]:
    """KL of k + 1 outcomes from log-probabilities [k]; its derivative with respect to the student's
    logits at other tokens, over q there; and [k] at the k tokens themselves."""
    wide = log_p.astype(np.float64)
    p, q = np.exp(wide), np.exp(log_q)
    p_all = math.fsum(p.tolist())
    p_tail, q_tail = 1 - p_all, 1 - math.fsum(q.tolist())
    kl = math.fsum((p * (wide - log_q)).tolist())
    floored = max(p_tail, FLOOR), max(q_tail, FLOOR)
    kl += floored[0] * math.log(floored[0] / floored[1])
    if q_tail <= FLOOR:  # the tail is a constant then
        return kl, p_all, p_all * q - p
    total = p_all + floored[0]  # 1, but for a floor
    return kl, total - floored[0] / q_tail, total * q - p
