"""Laws of all methods beyond the layer's own: sizes, layouts and NaN.

What is right is said by the kit's correct implementation in float64, on the very numbers that were
given (problems/every.py). Sums of small integers must be equal to it, the others near it, within
the bounds of near.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.laws import near
from pylora.conformance.laws.law import Law
from pylora.conformance.problems.every import (
    COUNTS,
    DTYPES,
    KINDS,
    OPTIONS,
    Path,
    arguments,
    leaves,
    mapped,
    walk,
)
from pylora.conformance.problems.layers import pick, st
from pylora.conformance.problems.layouts import LAYOUTS, Guard, laid_out
from pylora.conformance.testcase import NotTested, Problem, Trial
from pylora.types import Array

METHODS = tuple(KINDS)
MANY = 50  # arrays of a result from which on they are compared all at once
Args = dict[str, Any]
_CORRECT = Correct()


def given(t: Trial, method: str, dtype: str, seed: int, **sizes: int) -> Args:
    """The arguments of a call; without a window where the implementation has none."""
    args = arguments(method, dtype, seed, **sizes)
    shape = args.get("shape")
    if shape is not None and "window" not in getattr(t.implementation, "attention_options", ()):
        args["shape"] = replace(shape, window=0)
    return args


def invoke(of: Any, method: str, args: Args) -> Any:
    """The call; of a decoder what it gives for each of its chunks."""
    if method == "decoder":
        made = of.decoder(args["weights"], args["shape"])
        return [made.extend(*chunk) for chunk in args["chunks"]]
    return getattr(of, method)(*args.values())


def expected(t: Trial, method: str, args: Args) -> list[tuple[Path, Array]]:
    """The arrays of the result, in float64: of the weights that the implementation stores."""

    def wide(path: Path, a: Array) -> Array:
        weight = path[-1] == "W" or (path[0] == "weights" and a.ndim == 2)
        if weight and not method.endswith("merge") and t.precision != "fp32":
            a = t.weight(a)
        return a if a.dtype.kind in "iub" else a.astype(np.float64)

    with np.errstate(all="ignore"):
        return list(leaves(invoke(_CORRECT, method, mapped(args, wide))))


def compare(t: Trial, what: str, method: str, args: Args, got: Any) -> list[Array]:
    """Every array of the result is the one that is expected."""
    found = list(leaves(got))
    wanted = expected(t, method, args)
    if [path for path, _ in found] != [path for path, _ in wanted]:
        t.fail(f"{what}: {method} gave {len(found)} arrays, expected {len(wanted)}", got)
    wants = [want for _, want in wanted]
    limits = near.bounds(t, method, args, wants)
    if len(found) > MANY:  # as one
        if [a.shape for _, a in found] != [a.shape for a in wants]:
            t.fail(f"{what}: {method} gave arrays of other shapes than expected", got)
        each = ([a for _, a in found], wants, limits)
        flat = [np.concatenate([a.reshape(-1) for a in arrays]) for arrays in each]
        t.expect(f"{method} {what}", flat[0], flat[1], flat[2])
        return [a for _, a in found]
    for (_, a), (path, want), off in zip(found, wanted, limits):
        place = "".join(f"[{key!r}]" for key in path)
        t.expect(f"{method}{place} {what}", a, want, off)
    return [a for _, a in found]


def present(t: Trial, p: Problem) -> str:
    name: str = p.method
    if not callable(getattr(t.implementation, name, None)):
        raise NotTested(f"there is no {name}")
    if p.dtype not in KINDS[name].dtypes:
        raise NotTested(f"{name} is not asked for in {p.dtype}")
    return name


# ---- sizes ---------------------------------------------------------------------------------------


def _sizes(t: Trial, p: Problem) -> None:
    method = present(t, p)
    args = given(t, method, p.dtype, p.seed, **{p.name: p.size})
    compare(t, f"with {p.name} = {p.size}", method, args, invoke(t, method, args))


def _size(method: str, dtype: str, name: str, size: int, seed: int = 1) -> Problem:
    resized = lambda n: _size(method, dtype, name, max(KINDS[method].sizes[name], n), seed)
    return Problem(method=method, dtype=dtype, seed=seed, name=name, size=size, resized=resized)


def _all_sizes(dtype: str, examples: int) -> Iterator[Problem]:
    for method in METHODS:
        for name, size in walk(method, dtype, examples):
            for seed in range(1, 1 + OPTIONS.get(method, 1) if name in COUNTS else 2):
                yield _size(method, dtype, name, size, seed)  # what is clipped, and what is not


@st.composite  # type: ignore[untyped-decorator]
def _some_size(draw: Any, dtype: str) -> Problem:
    """One dimension of a size drawn evenly by its power of two."""
    method = draw(pick(METHODS))
    name = draw(pick(tuple(KINDS[method].sizes)))
    most = max(1, min(KINDS[method].most.get(name, 2048), 2048))
    size = int(2.0 ** draw(st.floats(0.0, float(np.log2(most)), width=16)))
    p = _size(method, dtype, name, max(KINDS[method].sizes[name], size))
    return p.replaced(seed=draw(st.integers(0, 99)))


# ---- layouts -------------------------------------------------------------------------------------


def _layouts(t: Trial, p: Problem) -> None:
    method = present(t, p)
    args = given(t, method, p.dtype, p.seed)
    paths = [path for path, _ in leaves(args)]
    chosen = paths if p.which < 0 else [paths[p.which % len(paths)]]
    named = "everything" if p.which < 0 else "".join(f"[{key!r}]" for key in chosen[0])

    def lay(path: Path, a: Array) -> Array:
        return laid_out(a, p.layout) if path in chosen else a

    laid = mapped(args, lay)
    guards = [Guard.of(a) for path, a in leaves(laid) if path in chosen]
    got = invoke(t, method, laid)
    compare(t, f"with {named} {p.layout}", method, laid, got)
    if not all(guard.untouched for guard in guards):
        t.fail(f"{method} wrote to the memory around {named}, which was {p.layout}", got)


# A broadcast array is made of other numbers, which may be none that the method takes.
_WAYS = tuple(layout for layout in LAYOUTS if not layout.startswith("broadcast"))


def _all_layouts(dtype: str, examples: int) -> Iterator[Problem]:
    for method in METHODS if dtype == "float32" else ():
        for which in range(-1, len(list(leaves(arguments(method, dtype))))):
            for layout in _WAYS:
                yield Problem(method=method, dtype=dtype, seed=2, which=which, layout=layout)


def _some_layout(dtype: str) -> Any:
    return st.builds(
        lambda method, seed, which, layout: Problem(
            method=method, dtype=dtype, seed=seed, which=which, layout=layout
        ),
        pick(METHODS),
        st.integers(0, 99),
        st.integers(-1, 30),
        pick(_WAYS),
    )


# ---- NaN and infinity ----------------------------------------------------------------------------


def _odd(t: Trial, p: Problem) -> None:
    method = present(t, p)
    args = mapped(given(t, method, p.dtype, p.seed), lambda _, a: _sound(a))
    silent = KINDS[method].silent
    places = [
        path for path, a in leaves(args) if a.dtype.kind not in "iub" and path[0] not in silent
    ]
    if not places:
        raise NotTested(f"of NaN in the arguments of {method} nothing is said")
    chosen = places[p.which % len(places)]

    def put(path: Path, a: Array) -> Array:
        if path == chosen:
            a = a.copy()
            a.reshape(-1)[(0, -1, a.size // 2)[p.at]] = p.odd
        return a

    odd = mapped(args, put)
    named = "".join(f"[{key!r}]" for key in chosen)
    got, said = invoke(t, method, odd), f"with {p.odd} in {named}"
    wants = [want for _, want in expected(t, method, odd)]
    limits = near.bounds(t, method, odd, wants)
    for (_, raw), want, off in zip(leaves(got), wants, limits):
        a = np.asarray(raw, np.float64)
        bad = ~np.isfinite(want)
        shown = np.isnan(a) if np.isnan(p.odd) else ~np.isfinite(a)
        if not shown[bad].all():
            t.fail(f"{method} {said}: an element that is computed from it does not show it", raw)
        if KINDS[method].spreads:
            continue
        t.expect(f"{method} {said}, elsewhere", raw, want[~bad], off[~bad], at=~bad)


def _sound(a: Array) -> Array:
    """Without signs: no sum of products is zero, which would leave open what is left out (V-2)."""
    return a if a.dtype.kind in "iub" else np.abs(a)


def _odd_problem(method: str, dtype: str, which: int, at: int, odd: float, seed: int) -> Problem:
    odd = odd if KINDS[method].exact else np.nan
    return Problem(method=method, dtype=dtype, which=which, at=at, odd=odd, seed=seed)


def _every_odd(dtype: str, examples: int) -> Iterator[Problem]:
    for method in METHODS if dtype == "float32" else ():
        for which in range(len(list(leaves(arguments(method, dtype))))):
            for at in (0, 1):
                for seed in range(OPTIONS.get(method, 1)):
                    yield _odd_problem(method, dtype, which, at, np.nan, seed)
            if KINDS[method].exact:
                yield _odd_problem(method, dtype, which, 2, np.inf, 3)


def _some_odd(dtype: str) -> Any:
    return st.builds(
        lambda method, which, at, odd, seed: _odd_problem(method, dtype, which, at, odd, seed),
        pick(METHODS),
        st.integers(0, 30),
        st.integers(0, 2),
        pick((np.nan, np.inf, -np.inf)),
        st.integers(0, 99),
    )


LAWS = (
    Law(
        "X31",
        "No size is a limit to any other method.",
        "each dimension of mixed gradients, biases, embeddings, blocks, caches, norms, "
        "gates, rotations, losses, steps, one beyond each limit of F12: equal on integers, else "
        "near the exact result",
        "a buffer, a tile or an index serves a usual size and no other",
        ("L-1",),
        ("forward",),
        _some_size,
        _sizes,
        (),
        dtypes=DTYPES,
        covering=_all_sizes,
    ),
    Law(
        "X30",
        "Nor does it matter to any other method how its arguments lie in memory.",
        "each array of each method, alone and all at once, laid out in eleven ways: as "
        "the exact result, and the memory around as it was",
        "a row's stride is taken for its length, a step for 1, or an argument is used as scratch",
        ("L-3", "F-6", "F-8"),
        ("forward",),
        _some_layout,
        _layouts,
        (),
        dtypes=DTYPES,
        covering=_all_layouts,
    ),
    Law(
        "V20",
        "NaN in any argument of any other method shows where it is read, and only there.",
        "NaN (of sums of products infinity too) in each array: elements that the formula "
        "computes from it are NaN, or not finite; the others as without",
        "a loss, a norm or a step is cleaned of NaN, or one bad row spreads",
        ("V-1", "V-8", "V-9", "N-5"),
        ("forward",),
        _some_odd,
        _odd,
        (),
        dtypes=DTYPES,
        covering=_every_odd,
    ),
)
