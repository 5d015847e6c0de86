"""Mutants of the methods beyond a layer's own (problems/every.py): right but for one size, layout,
dtype, number of calls or kind of value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.perturb.python import Mutant
from pylora.conformance.perturb.ways import Way, in_array, ways
from pylora.conformance.problems.every import KINDS, leaves, mapped

When = Callable[[tuple[Any, ...], int], bool]  # of the arguments and the number of the call
_MISREAD = ("not contiguous", "column-major", "of a negative stride", "not aligned")


def _wrong(method: str, when: When, way: Way) -> Callable[[], Any]:
    """Makes a Correct whose `method`, or whose decoder's `extend`, goes the way when it is so."""

    def make() -> Any:
        calls = [0]

        def through(plain: Callable[..., Any], *args: Any) -> Any:
            calls[0] += 1
            result = plain(*args)
            return way(result, args, plain) if when(args, calls[0]) else result

        def wrapped(self: Any, *args: Any) -> Any:
            plain = getattr(super(Wrong, self), method)
            if method != "decoder":
                return through(plain, *args)
            made = plain(*args)
            extend = made.extend
            made.extend = lambda *given: through(extend, *given)
            return made

        Wrong = type("Wrong", (Correct,), {method: wrapped, "name": f"{method}, perturbed"})
        return Wrong()

    return make


def _arrays(args: tuple[Any, ...]) -> list[Any]:
    return [a for _, a in leaves(list(args))]


def _longest(args: tuple[Any, ...]) -> int:
    """The largest dimension of any of the arrays, or how many arrays there are."""
    arrays = _arrays(args)
    longest: int = max([len(arrays), *(int(n) for a in arrays for n in a.shape)])
    return longest


def _so(layout: str, a: Any) -> bool:
    if a.size < 2:
        return False
    return {
        "not contiguous": not a.flags.c_contiguous,
        "column-major": a.flags.f_contiguous and not a.flags.c_contiguous,
        "of a negative stride": any(s < 0 for s in a.strides),
        "not aligned": not a.flags.aligned,
    }[layout]


def _turned(layout: str) -> Way:
    """Arrays that lie so are read in another order than they have."""

    def read(path: Any, a: Any) -> Any:
        if not _so(layout, a) or a.dtype.kind == "b":
            return a
        return np.ascontiguousarray(a).reshape(-1)[::-1].reshape(a.shape).copy()

    return lambda result, args, call: call(*mapped(list(args), read))


def _cleaned(result: Any, args: Any, call: Any) -> Any:
    def clean(path: Any, a: Any) -> Any:
        return a if a.dtype.kind in "iub" else np.where(np.isfinite(a), a, a.dtype.type(0))

    return mapped(result, clean)


def _whole(result: Any, args: Any, call: Any) -> Any:
    """The last array of the result is not finite anywhere."""
    return in_array(result, lambda a: a * a.dtype.type(np.nan), -1)


def _odd(args: tuple[Any, ...]) -> bool:
    return any(a.dtype.kind not in "iub" and not np.isfinite(a).all() for a in _arrays(args))


def mutants() -> Iterator[Mutant]:
    """All of them."""
    for method, kind in KINDS.items():
        for limit in (8, 32, 64, 256, 1024, 4096):
            if limit > min([4096, *kind.most.values()]):
                continue
            for said, way in ways(method).items():
                when = lambda args, call, limit=limit: _longest(args) > limit
                yield _one(method, f"a dimension > {limit}: {said}", when, way)
        for layout in _MISREAD:
            when = lambda args, call, layout=layout: any(_so(layout, a) for a in _arrays(args))
            yield _one(method, f"arrays {layout} are read otherwise", when, _turned(layout))
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            for said, way in ways(method).items():
                when = lambda args, call, dtype=dtype: any(a.dtype == dtype for a in _arrays(args))
                yield _one(method, f"in {dtype}: {said}", when, way)
        for n in (2, 5, 16):
            for said, way in ways(method).items():
                when = lambda args, call, n=n: call > n
                yield _one(method, f"after {n} calls: {said}", when, way)
        if set(kind.silent) != {"logits"}:
            yield _one(method, "NaN is cleaned away", lambda args, call: _odd(args), _cleaned)
        if not kind.spreads:
            yield _one(method, "NaN spreads", lambda args, call: _odd(args), _whole)


def _one(method: str, said: str, when: When, way: Way) -> Mutant:
    text = f"{method}, {said}"
    make = _wrong(method, when, way)
    return Mutant(f"others: {text}", "others", text, make, frozenset({method}))
