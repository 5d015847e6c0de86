"""Steps in which some adapters bring weights of their own: each goes through its own operation.

An adapter with whole weights (`Whole`) runs on a model of its own, which shares all other weights
with the base and reads and writes the same cache. A step of several such models is taken apart by
sequences, and the logits are put together again. A sequence has the bits that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pylora.ops.llama import LlamaOp, Step
from pylora.ops.protocol import Backend
from pylora.types import Array, Seqs


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """A packed adapter that runs on another operation than the base's."""

    op: LlamaOp
    adapter: Any  # of that operation, or None
    nbytes: int


@dataclass(eq=False)
class _Caches:
    """The same keys and values as each operation takes them."""

    k: Sequence[Array]
    v: Sequence[Array]
    each: dict[int, tuple[LlamaOp, Any]] = field(default_factory=dict)

    def of(self, op: LlamaOp) -> Any:
        if id(op) not in self.each:
            self.each[id(op)] = op, op.cache(self.k, self.v)
        return self.each[id(op)][1]


class Mixed:
    """`LlamaOp.cache` and `forward` for steps that have an `OwnWeights` among their adapters."""

    def __init__(self, base: LlamaOp, ops: Backend) -> None:
        self.base, self.ops = base, ops

    def cache(self, k: Sequence[Array], v: Sequence[Array]) -> Any:
        return _Caches(k, v)

    def forward(self, cache: Any, step: Step) -> Array:
        """Logits [n, vocab] of the wanted tokens, in their order."""
        groups: dict[int, tuple[LlamaOp, list[int]]] = {}
        for i, adapter in enumerate(step.adapters):
            op = adapter.op if isinstance(adapter, OwnWeights) else self.base
            groups.setdefault(id(op), (op, []))[1].append(i)
        if len(groups) == 1:
            ((op, _),) = groups.values()
            return op.forward(cache.of(op), replace(step, adapters=_inner(step.adapters)))
        out: Array = None
        for op, segments in groups.values():
            part, wanted = _part(step, segments)
            logits = op.forward(cache.of(op), part)
            if out is None:
                out = self.ops.empty((step.output.size, logits.shape[1]), logits.dtype)
            if wanted.size:
                out[self.ops.xp.asarray(wanted)] = logits
        return out


def _inner(adapters: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(a.adapter if isinstance(a, OwnWeights) else a for a in adapters)


def _part(step: Step, segments: Sequence[int]) -> tuple[Step, np.ndarray]:
    """The step of some segments alone, and which of the step's outputs it gives. One that gives
    none has an output all the same, its last token's."""
    start, seqs = step.start, step.seqs
    tokens = np.concatenate([np.arange(start[s], start[s + 1]) for s in segments])
    mine = np.flatnonzero(np.isin(seqs.q_start[:-1], tokens))
    q_start = np.append(0, np.cumsum(np.diff(seqs.q_start)[mine]))
    number = np.full(int(seqs.q_start[-1]), -1, np.int64)  # of a token in the part
    number[tokens] = np.arange(tokens.size)
    wanted = np.flatnonzero(number[step.output] >= 0)
    output = number[step.output[wanted]]
    sizes = [int(start[s + 1] - start[s]) for s in segments]
    part = Step(
        step.ids[tokens],
        step.position[tokens],
        step.rows[tokens],
        Seqs(q_start.astype(np.int64), seqs.k_start[mine].copy(), seqs.k_len[mine].copy()),
        output if output.size else np.array([tokens.size - 1], np.int64),
        np.append(0, np.cumsum(sizes)).astype(np.int64),
        _inner([step.adapters[s] for s in segments]),
        tuple(replace(r, position=r.position[tokens]) for r in step.rotations),
    )
    return part, wanted
