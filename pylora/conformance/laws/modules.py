"""Laws of sequences of calls of modules: attach, detach, merge, unmerge and what is computed in
between, in any order, of one module and of two that share a weight.

What should come of it is said by a model that keeps for each module which adapter is attached, and
whether it is merged: nothing else may matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.conformance.bounds import layer as bounds
from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES
from pylora.conformance.problems.sequences import module_sequences, short_sequences, written
from pylora.conformance.testcase import Broken, ModuleTrial, Problem, Trial
from pylora.types import Array

Triple = tuple[Array, Array, float]


@dataclass
class Model:
    """What a module should be: all that counts."""

    module: ModuleTrial
    W: Array  # as it was given
    which: int | None = None  # of the adapters, attached
    values: Triple | None = None  # its arrays as they were when it was attached
    merged: bool = False
    stale: bool = False  # its arrays were written to since: whether it sees that is its own choice

    def lora(self) -> list[Triple]:
        return [] if self.values is None else [self.values]


class Sequence:
    """One problem's steps, taken one after another."""

    def __init__(self, t: Trial, p: Problem) -> None:
        self.t, self.p = t, p
        self.rng = np.random.default_rng(p.seed)
        self.x = [p.x, p.x2]
        pairs = (p.A, p.B), (p.A2, p.B2), (p.A3, p.B3)
        self.adapters = [(A.copy(), B.copy(), s) for (A, B), s in zip(pairs, p.scales)]
        W = p.W.copy()
        self.given = [W, W if p.shared else p.W2.copy()]
        self.models = [Model(t.module(W, p.bias), W.copy()) for W in self.given]

    def run(self) -> None:
        """All steps, and then what each module computes, with its adapter and without."""
        for n, (word, *parts) in enumerate(self.p.steps):
            self.now = f"step {n + 1}"
            getattr(self, word)(*parts)
        self.now = "all steps"
        for i in (0, 1):
            self.forward(i, 0)
        for i, model in enumerate(self.models):
            if model.which is not None:
                if not self.may("detach", i, refuse=model.merged):
                    self.unmerge(i)
                    self.may("detach", i, refuse=False)
                model.which = model.values = None
                model.merged = model.stale = False
            self.now = "detach"
            self.forward(i, 1)
            said = "the W that a module was made of, after all steps,"
            self.t.expect(said, self.given[i], model.W, signs=True)

    def may(self, method: str, i: int, *arguments: Any, refuse: bool) -> bool:
        """Whether the call was carried out; Broken if it was refused and may not be."""
        try:
            getattr(self.models[i].module, method)(*arguments)
        except Broken:
            if not refuse:
                raise
            self.t.calls[-1].refused = True
            return False
        return True

    # ---- steps ----------------------------------------------------------------------------------

    def forward(self, i: int, j: int) -> None:
        model, x = self.models[i], self.x[j]
        y = model.module.forward(x)
        if model.stale:
            return
        W = self.t.weight(model.W)
        want = oracle.forward(x, W, model.lora(), self.p.bias)
        q = self.p.replaced(x=x, W=model.W, adapters=model.lora())
        off = allowed.stacked(self.t, q)
        if model.merged and model.values is not None and not isinstance(off, float):
            off = bounds.merged_forward(x, model.W, *model.values, self.p.bias)
        self.t.expect(f"y of module {i + 1} after {self.now}", y, want, off)

    def attach(self, i: int, a: int) -> None:
        model, (A, B, s) = self.models[i], self.adapters[a]
        if self.may("attach", i, A, B, s, refuse=model.which is not None):
            model.which, model.values = a, (A.copy(), B.copy(), s)
            model.merged = model.stale = False

    def detach(self, i: int) -> None:
        model = self.models[i]
        if self.may("detach", i, refuse=model.which is None or model.merged):
            model.which = model.values = None
            model.merged = model.stale = False

    def merge(self, i: int) -> None:
        model = self.models[i]
        idle = model.which is None or model.merged
        if model.module.has("merge") and self.may("merge", i, refuse=idle) and not idle:
            model.merged = True

    def unmerge(self, i: int) -> None:
        model = self.models[i]
        if model.module.has("unmerge") and self.may("unmerge", i, refuse=not model.merged):
            model.merged = False

    def weight(self, i: int) -> None:
        model = self.models[i]
        if not model.module.has("weight") or (model.stale and model.merged):
            return
        got, want, off = model.module.weight(), model.W, 0.0 * model.W.astype(np.float64)
        if model.merged and model.values is not None:
            want = oracle.merged(model.W, *model.values)
            off = off + allowed.merged(model.W, *model.values)
        self.t.expect(f"the weight of module {i + 1} after {self.now}", got, want, off)

    def update(self, a: int, how: str) -> None:
        A, B, _ = self.adapters[a]
        written(A, how, self.rng)
        written(B, how, self.rng)
        for model in self.models:
            model.stale |= model.which == a


def _sequence(t: Trial, p: Problem) -> None:
    Sequence(t, p).run()


ARRAYS = ("x", "x2", "W", "W2", "A", "B", "A2", "B2", "A3", "B3", "bias")
LAWS = (
    Law(
        "C1",
        "What a module computes is said by what is attached to it now, whatever came before.",
        "y = x Wᵀ + bias + s (x Aᵀ) Bᵀ of the attached adapter, weight() = W where none is merged, "
        "after up to 12 calls of two modules that may share W, exact on small integers",
        "something of an adapter, of a merge or of another module stays behind, or of a call that "
        "was refused",
        ("C-1", "C-5", "C-7", "C-8", "X-5", "M-5"),
        ("module",),
        module_sequences,
        _sequence,
        ARRAYS,
        dtypes=DTYPES,
        covering=short_sequences(
            ("attach", 0, 0), ("attach", 0, 1), ("merge", 0), ("unmerge", 0), ("detach", 0)
        ),
    ),
    Law(
        "C2",
        "What is written into A and B after they were attached never reaches the weight.",
        "as C1, with A and B written to in place: after unmerge and after detach W is what it was, "
        "and attached again they count as they then are; exact",
        "unmerging takes out what A and B hold now, not what was merged, or what is attached again "
        "is taken for known",
        ("C-3", "C-7", "M-3"),
        ("module",),
        module_sequences,
        _sequence,
        ARRAYS,
        dtypes=DTYPES,
        covering=short_sequences(
            ("attach", 0, 0), ("merge", 0), ("update", 0, "all"), ("unmerge", 0), ("weight", 0)
        ),
    ),
)
