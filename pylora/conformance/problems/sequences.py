"""Hypothesis strategies of sequences of calls: what is called with what, one step after another.

A step is a tuple of a word and numbers, so that hypothesis can leave steps out and make them
simple, and so that a program can print them. The arrays are small integers and the shapes tiny:
what is found here hangs on the order of calls, and every result is exact in every dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pylora.conformance.problems.layers import SEEDS, integer_array, np_dtype, pick, st
from pylora.conformance.testcase import Problem
from pylora.types import Array

WRITES = ("all", "last", "turned")  # what of an array is written anew: see `written`
SCALES = (1.0, 2.0, -1.0, 0.5)
MOST = 12  # steps

_pair, _triple = st.integers(0, 1), st.integers(0, 2)
_which = st.sampled_from((0, 0, 0, 1))  # of the modules: one is at work, mostly
_how = st.sampled_from(WRITES)


def _step(word: str, *parts: Any) -> Any:
    return st.tuples(st.just(word), *parts)


MODULE_STEPS = st.one_of(
    _step("forward", _which, _pair),
    _step("attach", _which, _triple),
    _step("merge", _which),
    _step("unmerge", _which),
    _step("detach", _which),
    _step("weight", _which),
    _step("update", _triple, _how),
)
_LAYER = (_triple, _pair, _triple, _triple)  # x, W, adapter, scale
FUNCTION_STEPS = {
    "forward": _step("forward", *_LAYER),
    "base": _step("base", _triple, _pair),
    "backward": _step("backward", *_LAYER),
    "stacked": _step("stacked", _triple, _pair, st.lists(_triple, max_size=3), _triple),
    "mixed": _step("mixed", _triple, _pair, st.lists(_triple, max_size=3), _triple, SEEDS),
    "merge": _step("merge", _pair, _triple, _triple),
    "unmerge": _step("unmerge", st.integers(0, 3)),
    "threads": _step("threads", st.integers(1, 3)),
    "dropout": _step("dropout", *_LAYER, _pair),
    "dropout_backward": _step("dropout_backward", *_LAYER, _pair),
    "write": _step("write", st.sampled_from(("x", "W", "A", "B", "dy", "bias")), _triple, _how),
    "spoil": _step("spoil", st.integers(0, 3)),
    "refused": _step("refused", _triple, _pair),
}


@st.composite  # type: ignore[untyped-decorator]
def sequences(draw: Any, dtype: str = "float32", steps: Any = MODULE_STEPS) -> Problem:
    """Two inputs of one shape and one of another, two weights, three adapters (the first two of one
    shape), three scales, and up to MOST steps with them. `shared`: both modules have one W."""
    narrow = np_dtype(dtype).itemsize == 2
    m, k, d = draw(pick((1, 2, 3))), draw(pick((1, 2, 3, 4))), draw(pick((1, 2, 3, 4)))
    r, rng = draw(pick((1, 2))), np.random.default_rng(draw(SEEDS))
    ranks = (r, r, draw(pick((1, 2) if narrow else (1, 2, 3, 8))))

    def make(*shape: int) -> Array:
        a = integer_array(rng, shape, dtype=dtype)
        return np.where(a == 0, 1, a).astype(a.dtype) if rng.random() < 0.5 else a

    tokens = (m, m, draw(pick((1, 2, 5))))
    arrays: dict[str, Array] = {}
    for i in range(3):
        end = str(i + 1) if i else ""
        arrays |= {f"x{end}": make(tokens[i], k), f"dy{end}": make(tokens[i], d)}
        arrays |= {f"A{end}": make(ranks[i], k), f"B{end}": make(d, ranks[i])}
    return Problem(
        **arrays,
        W=make(d, k),
        W2=make(d, k),
        bias=make(d) if draw(st.booleans()) else None,
        scales=tuple(draw(pick(SCALES)) for _ in range(3)),
        shared=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        steps=draw(st.lists(steps, min_size=1, max_size=MOST)),
    )


def module_sequences(dtype: str = "float32") -> Any:
    """Steps with modules."""
    return sequences(dtype)


def _fixed() -> dict[str, Any]:
    """The arrays of a sequence that is not drawn: no zeros, and no two alike."""
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3), "x2": (2, 3), "x3": (5, 3), "dy": (2, 2), "dy2": (2, 2), "dy3": (5, 2)}
    shapes |= {"W": (2, 3), "W2": (2, 3), "A": (1, 3), "B": (2, 1), "A2": (1, 3), "B2": (2, 1)}
    shapes |= {"A3": (2, 3), "B3": (2, 2)}
    arrays = {n: rng.integers(1, 4, s).astype(np.float32) for n, s in shapes.items()}
    bias = np.array([1.0, 2.0], np.float32)
    return {**arrays, "bias": bias, "scales": (1.0, 2.0, 0.5), "shared": True, "seed": 1}


def short_sequences(*words: tuple[Any, ...], then: Any = ("forward", 0, 0)) -> Any:
    """All sequences of these steps up to 3 long, 4 in the quick profile and more beyond it, as a
    function of dtype and examples; longer ones begin with the first word. The shorter ones are
    there twice: with `then` after each step, and without. float32 alone: they hang on no dtype."""

    def covering(dtype: str, examples: int) -> Iterator[Problem]:
        if dtype != "float32":
            return
        given = _fixed()
        longest = 3 + (examples >= 40) + (examples >= 1000) + (examples >= 10_000)
        longest -= len(words) > 6
        for n in range(1, longest + 1):
            first = words[:1] if n > 2 else words
            for chosen in itertools.product(first, *[words] * (n - 1)):
                for often in (False, True)[: 1 + (n < longest and then is not None)]:
                    steps = [s for step in chosen for s in (step, then)[: 1 + often]]
                    yield Problem(**given, steps=steps)

    return covering


CALLS: dict[str, tuple[Any, ...]] = {
    "forward": (0, 0, 0, 0),
    "base": (0, 0),
    "backward": (0, 0, 0, 0),
    "stacked": (0, 0, [0, 1], 0),
    "mixed": (0, 0, [0, 1], 0, 5),
    "merge": (0, 0, 0),
    "dropout": (0, 0, 0, 0, 0),
    "dropout_backward": (0, 0, 0, 0, 0),
}


def disturbed(dtype: str, examples: int) -> Iterator[Problem]:
    """Each call, something else, and the call again: an array written to in each way, the same call
    with one argument exchanged, another call, the result overwritten, a refusal, another number of
    threads; with an adapter whose B is zero, too."""
    if dtype != "float32":
        return
    between: list[Any] = [("spoil", 0), ("refused", 0, 0), ("threads", 2)]
    between += [("write", n, 0, how) for n in ("x", "W", "A", "B", "dy", "bias") for how in WRITES]
    between += [(word, *parts) for word, parts in CALLS.items()]
    for fresh, (word, parts) in itertools.product((False, True), CALLS.items()):
        given, call = _fixed(), (word, *parts)
        given["B"] *= not fresh
        others = [
            (word, *parts[:i], value, *parts[i + 1 :])
            for i, part in enumerate(parts)
            for value in (([1, 2], [2, 1, 0], [0]) if isinstance(part, list) else (1, 2))
            if not (value == 2 and i == (0 if word == "merge" else 1))  # there are two W
        ]
        for step in between + others:
            more = [("unmerge", 0)] if word == "merge" else []
            yield Problem(**given, steps=[call, step, call, *more])


def function_sequences(*words: str) -> Any:
    """Steps with these words (all if none), as a function of the dtype."""
    chosen = st.one_of([FUNCTION_STEPS[w] for w in words or tuple(FUNCTION_STEPS)])
    return lambda dtype="float32": sequences(dtype, chosen)


def written(a: Array, how: str, rng: np.random.Generator) -> None:
    """New numbers in an array, in place: in all of it; in its last element; or its elements in
    reverse order, so that its sum stays. What a cache looks at to see whether it is up to date."""
    if not a.size:
        return
    flat = a.reshape(-1)
    before = flat.copy()
    if how == "turned":
        flat[...] = before[::-1]
    elif how == "all":
        flat[...] = integer_array(rng, flat.shape, dtype=a.dtype)
    if how == "last" or bool((flat == before).all()):
        flat[-1] = -before[-1] if before[-1] != 0 else 1
