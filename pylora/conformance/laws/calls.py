"""Laws of sequences of calls of an implementation's functions: each result is a function of that
call's arguments, whatever was called before, and belongs to the caller.

The arrays are written to in place between calls, results are kept and looked at again when all is
over, results are overwritten, several merges are pending at a time, calls are refused in between.
What should come of each is the oracle's, which keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pylora.conformance.laws import allowed, oracle
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.layers import DTYPES
from pylora.conformance.problems.sequences import (
    disturbed,
    function_sequences,
    short_sequences,
    written,
)
from pylora.conformance.testcase import Broken, NotTested, Problem, Trial
from pylora.types import Array

P = 0.5  # of dropout: 1 / (1 - p) is exact
Triple = tuple[Array, Array, float]
NAMES = ("dx", "dA", "dB")


@dataclass
class Kept:
    """An array that a call gave, and what it must hold for as long as the caller keeps it."""

    what: str
    got: Any
    want: Array
    bound: Any
    of: Any  # the whole result
    item: tuple[Any, ...] = ()
    spoiled: bool = False


@dataclass
class Merge:
    """A merge that is pending, and copies of what it was made of."""

    weight: Any
    state: Any
    adapter: Triple
    W: Array


class Sequence:
    """One problem's steps, taken one after another."""

    def __init__(self, t: Trial, p: Problem) -> None:
        self.t, self.p, self.rng = t, p, np.random.default_rng(p.seed)
        copy = {n: a.copy() for n, a in vars(p).items() if isinstance(a, np.ndarray)}
        self.x = [copy["x"], copy["x2"], copy["x3"]]
        self.dy = [copy["dy"], copy["dy2"], copy["dy3"]]
        self.W = [copy["W"], copy["W2"]]
        self.A = [copy["A"], copy["A2"], copy["A3"]]
        self.B = [copy["B"], copy["B2"], copy["B3"]]
        self.bias = copy.get("bias")
        self.kept: list[Kept] = []
        self.merges: list[Merge] = []
        self.masks: dict[tuple[int, int], Array] = {}

    def run(self) -> None:
        """All steps, and then a look at everything that was kept."""
        for word, *parts in self.p.steps:
            if word.startswith("dropout"):
                self._mask(parts[0], parts[4])
        for word, *parts in self.p.steps:
            getattr(self, word)(*parts)
        if self.can("set_num_threads"):
            self.t.set_num_threads(1)
        for kept in self.kept:
            if not kept.spoiled:
                said = f"{kept.what}, looked at again after later calls,"
                self.t.expect(said, kept.of, kept.want, kept.bound, item=kept.item)

    def can(self, method: str) -> bool:
        return callable(getattr(self.t.implementation, method, None))

    def lora(self, a: int, s: int) -> Triple:
        return self.A[a], self.B[a], self.p.scales[s]

    def problem(self, x: int, w: int, adapter: Triple, **more: Any) -> Problem:
        """As the functions that say what is allowed want it."""
        A, B, scale = adapter
        given = {"x": self.x[x], "W": self.W[w], "dy": self.dy[x], "bias": self.bias}
        return Problem(**{**given, "A": A, "B": B, "scale": scale, **more})

    def keep(
        self, method: str, result: Any, parts: list[tuple[str, tuple[Any, ...], Any, Any]]
    ) -> None:
        """Looks at a result now, and remembers it. Each part: name, keys, what it is, bound."""
        for name, item, want, bound in parts:
            what = f"{name} of {method}"
            self.t.expect(what, result, want, bound, item=item)
            got = result
            for key in item:
                got = got[key]
            for other in [*self.x, *self.dy, *self.W, *self.A, *self.B, self.bias]:
                if other is not None:
                    self.t.apart(f"{what} shares memory with an argument", got, other)
            for kept in self.kept:
                self.t.apart(f"{what} shares memory with {kept.what}", got, kept.got)
            self.kept.append(Kept(what, got, want, bound, result, item))

    # ---- steps ----------------------------------------------------------------------------------

    def forward(self, x: int, w: int, a: int, s: int) -> None:
        A, B, scale = self.lora(a, s)
        y = self.t.forward(self.x[x], self.W[w], A, B, scale, self.bias)
        W = self.t.weight(self.W[w])
        want = oracle.forward(self.x[x], W, [(A, B, scale)], self.bias)
        off = allowed.forward(self.t, self.problem(x, w, (A, B, scale)))
        self.keep("forward", y, [("y", (), want, off)])

    def base(self, x: int, w: int) -> None:
        if not self.can("base"):
            return
        y = self.t.base(self.x[x], self.W[w], self.bias)
        want = oracle.forward(self.x[x], self.t.weight(self.W[w]), [], self.bias)
        off = allowed.base(self.t, self.problem(x, w, self.lora(0, 0)))
        self.keep("base", y, [("y", (), want, off)])

    def backward(self, x: int, w: int, a: int, s: int) -> None:
        if not self.can("backward"):
            return
        A, B, scale = self.lora(a, s)
        got = self.t.backward(self.dy[x], self.x[x], self.W[w], A, B, scale)
        want = oracle.backward(self.dy[x], self.x[x], self.t.weight(self.W[w]), A, B, scale)
        off = allowed.backward(self.t, self.problem(x, w, (A, B, scale)))
        self.keep("backward", got, [(n, (i,), want[i], off[i]) for i, n in enumerate(NAMES)])

    def _several(self, which: list[int], s: int) -> list[Triple]:
        """The scales change from one to the next, and from call to call."""
        return [self.lora(a, (s + i) % 3) for i, a in enumerate(which)]

    def stacked(self, x: int, w: int, which: list[int], s: int) -> None:
        if not self.can("forward_stacked"):
            return
        adapters = self._several(which, s)
        y = self.t.forward_stacked(self.x[x], self.W[w], adapters, self.bias)
        want = oracle.forward(self.x[x], self.t.weight(self.W[w]), adapters, self.bias)
        p = self.problem(x, w, self.lora(0, 0), adapters=adapters)
        self.keep("forward_stacked", y, [("y", (), want, allowed.stacked(self.t, p))])

    def mixed(self, x: int, w: int, which: list[int], s: int, seed: int) -> None:
        if not self.can("forward_mixed"):
            return
        adapters = self._several(which, s)
        m = len(self.x[x])
        rows = np.random.default_rng(seed).integers(-1, len(adapters), m).astype(np.int64)
        y = self.t.forward_mixed(self.x[x], self.W[w], adapters, rows, self.bias)
        want = oracle.mixed(self.x[x], self.t.weight(self.W[w]), adapters, rows, self.bias)
        p = self.problem(x, w, self.lora(0, 0), adapters=adapters, rows=rows)
        self.keep("forward_mixed", y, [("y", (), want, allowed.mixed(self.t, p))])

    def merge(self, w: int, a: int, s: int) -> None:
        if not self.can("merge"):
            return
        W, (A, B, scale) = self.W[w], self.lora(a, s)
        result = self.t.merge(W, A, B, scale)
        pair = isinstance(result, tuple)
        want, off = oracle.merged(W, A, B, scale), allowed.merged(W, A, B, scale)
        self.keep("merge", result, [("W'", (0,) if pair else (), want, off)])
        weight, state = result if pair else (result, None)
        self.merges.append(Merge(weight, state, (A.copy(), B.copy(), scale), W.copy()))

    def unmerge(self, i: int) -> None:
        if not self.merges or not self.can("unmerge"):
            return
        merge = self.merges[i % len(self.merges)]
        if any(k.spoiled and k.got is merge.weight for k in self.kept):
            return
        state = () if merge.state is None else (merge.state,)
        back = self.t.unmerge(merge.weight, *merge.adapter, *state)
        off = allowed.merged(merge.W, *merge.adapter)
        self.keep("unmerge", back, [("W", (), merge.W, off)])

    def threads(self, n: int) -> None:
        if self.can("set_num_threads"):
            self.t.set_num_threads(n)

    def _mask(self, x: int, seed: int) -> Array:
        """What dropout multiplies the elements of x by, read off before the first step."""
        shape = self.x[x].shape
        if (x, seed) not in self.masks and self.can("dropout_forward"):
            one = np.eye(shape[1]).astype(self.x[x].dtype)
            ones, W = np.ones(shape, one.dtype), np.zeros_like(one)
            self.masks[x, seed] = self.t.dropout_forward(ones, W, one, one, 1.0, P, seed).copy()
        return self.masks.get((x, seed), np.zeros(0))

    def dropout(self, x: int, w: int, a: int, s: int, seed: int) -> None:
        if not self.can("dropout_forward"):
            return
        A, B, scale = self.lora(a, s)
        y = self.t.dropout_forward(self.x[x], self.W[w], A, B, scale, P, seed)
        W = self.t.weight(self.W[w])
        want = oracle.dropped(self.dy[x], self.x[x], self._mask(x, seed), W, A, B, scale)[0]
        p = self.problem(x, w, (A, B, scale / (1 - P)), bias=None)
        self.keep("dropout_forward", y, [("y", (), want, allowed.forward(self.t, p))])

    def dropout_backward(self, x: int, w: int, a: int, s: int, seed: int) -> None:
        if not (self.can("dropout_backward") and self.can("dropout_forward")):
            return
        A, B, scale = self.lora(a, s)
        dy, given = self.dy[x], self.x[x]
        got = self.t.dropout_backward(dy, given, self.W[w], A, B, scale, P, seed)
        W = self.t.weight(self.W[w])
        want = oracle.dropped(dy, given, self._mask(x, seed), W, A, B, scale)[1:]
        off = allowed.backward(self.t, self.problem(x, w, (A, B, scale / (1 - P))))
        parts = [(n, (i,), want[i], off[i]) for i, n in enumerate(NAMES)]
        self.keep("dropout_backward", got, parts)

    def write(self, name: str, i: int, how: str) -> None:
        if name == "bias":
            if self.bias is not None:
                written(self.bias, how, self.rng)
            return
        arrays = getattr(self, name)
        written(arrays[i % len(arrays)], how, self.rng)

    def spoil(self, i: int) -> None:
        """The caller overwrites a result."""
        if self.kept:
            kept = self.kept[i % len(self.kept)]
            if kept.got.flags.writeable:
                kept.spoiled = True
                kept.got[...] = 1

    def refused(self, x: int, w: int) -> None:
        """A call whose arrays do not fit each other; what it does is its own affair."""
        A, B, scale = self.lora(0, 0)
        try:
            if self.can("forward_mixed"):
                rows = np.full(len(self.x[x]), 7)
                self.t.forward_mixed(self.x[x], self.W[w], [(A, B, scale)], rows, self.bias)
            else:
                self.t.forward(self.x[x], self.W[w], A[:, :0], B, scale, self.bias)
        except (Broken, NotTested):
            self.t.calls[-1].refused = True


METHODS = {
    "merge": "merge",
    "dropout": "dropout_forward",
    "mixed": "forward_mixed",
    "stacked": "forward_stacked",
}


def _sequence(t: Trial, p: Problem) -> None:
    Sequence(t, p).run()


def _one_of(*words: str) -> Callable[[Trial, Problem], None]:
    """The same, where the implementation has one of the methods that it is about."""

    def check(t: Trial, p: Problem) -> None:
        if not any(callable(getattr(t.implementation, METHODS[w], None)) for w in words):
            raise NotTested(f"there is no {' or '.join(METHODS[w] for w in words)}")
        _sequence(t, p)

    return check


ARRAYS = (
    "x", "x2", "x3", "dy", "dy2", "dy3", "W", "W2", "A", "B", "A2", "B2", "A3", "B3", "bias",
)  # fmt: skip


LAWS = (
    Law(
        "C3",
        "A result is what its own arguments say, and stays so: no other call matters to it.",
        "up to 12 calls of all functions, arrays written to in place, results kept or overwritten "
        "in between: each result is the oracle's when it is given and at the end, and shares "
        "memory with no argument and no other result, exact on small integers",
        "a cache that does not see that an array was written to, a scratch buffer that is given "
        "away, something of an earlier or a refused call in a later one",
        ("C-1", "C-2", "C-3", "C-5", "N-3"),
        ("forward",),
        function_sequences(),
        _sequence,
        ARRAYS,
        dtypes=DTYPES,
        covering=disturbed,
    ),
    Law(
        "C4",
        "Several merges may be pending, and each is taken back by its own state.",
        "as C3, of merge and unmerge in any order, W, A and B written to in between",
        "what unmerge needs lies in the object, or in the W that it was given, not in the state",
        ("C-1", "C-2", "C-4"),
        ("merge", "unmerge"),
        function_sequences("merge", "unmerge", "write", "spoil", "forward"),
        _sequence,
        ARRAYS,
        dtypes=DTYPES,
        covering=short_sequences(
            ("merge", 0, 0, 0),
            ("merge", 0, 1, 1),
            ("unmerge", 0),
            ("unmerge", 1),
            ("write", "W", 0, "all"),
            ("write", "A", 0, "last"),
            then=None,
        ),  # fmt: skip
    ),
    Law(
        "C5",
        "Dropout hangs on its own seed, not on what was dropped before.",
        "as C3, of forward and backward with dropout, of two seeds in any order",
        "the backward pass takes the mask of the last forward pass, or a seed moves on by itself",
        ("C-1", "D-3", "D-5"),
        ("dropout_forward",),
        function_sequences("dropout", "dropout_backward", "write", "forward"),
        _sequence,
        ARRAYS,
        dtypes=DTYPES,
        covering=short_sequences(
            ("dropout", 0, 0, 0, 0, 0),
            ("dropout", 0, 0, 0, 0, 1),
            ("dropout", 1, 0, 0, 0, 0),
            ("dropout_backward", 0, 0, 0, 0, 0),
            ("dropout_backward", 0, 0, 0, 0, 1),
            then=None,
        ),  # fmt: skip
    ),
    Law(
        "C6",
        "Several adapters are taken as they are given, whatever lay in their place before.",
        "as C3, of mixed batches and stacked adapters: added, removed, replaced, rescaled",
        "a slot keeps the scale, the arrays or the rank of the adapter before; a list of as many "
        "adapters as before is taken for the same",
        ("C-1", "C-3", "X-5"),
        ("forward",),
        function_sequences("mixed", "stacked", "write", "refused"),
        _one_of("mixed", "stacked"),
        ARRAYS,
        dtypes=DTYPES,
        covering=short_sequences(
            ("mixed", 0, 0, [2, 0], 0, 5),
            ("mixed", 0, 0, [0, 1], 0, 5),
            ("mixed", 0, 0, [1, 0], 0, 5),
            ("mixed", 0, 0, [0, 1], 1, 5),
            ("mixed", 0, 0, [0], 0, 5),
            ("stacked", 0, 0, [0, 1], 1),
            ("write", "A", 0, "turned"),
            ("refused", 0, 0),
            then=None,
        ),  # fmt: skip
    ),
)
