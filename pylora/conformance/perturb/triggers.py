"""A correct method that is wrong under one condition: beyond a size, in one dtype, for one layout,
from some call on, for one kind of value, beside another row.

A condition and a way of being wrong make a mutant: for each method, each of its sizes, each usual
limit and each way there is one, thousands in all; `mutants(kind)` lists them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pylora.conformance.correct.plain import Correct
from pylora.conformance.perturb.python import Mutant
from pylora.conformance.perturb.sizes_of import ARRAYS, SIZES
from pylora.conformance.perturb.ways import Way, in_array, ways
from pylora.conformance.problems.sizes import LIMITS

When = Callable[[tuple[Any, ...], int], bool]  # of the arguments and the number of the call

# ---- making one ----------------------------------------------------------------------------------


def wrong(method: str, when: When, way: Way) -> Callable[[], Any]:
    """Makes a Correct whose `method` goes the way when its arguments are so."""

    def make() -> Any:
        calls = [0]

        def wrapped(self: Any, *args: Any) -> Any:
            plain = getattr(super(Wrong, self), method)
            calls[0] += 1
            result = plain(*args)
            return way(result, args, plain) if when(args, calls[0]) else result

        Wrong = type("Wrong", (Correct,), {method: wrapped, "name": f"{method}, perturbed"})
        return Wrong()

    return make


def _size(method: str, name: str, limit: int) -> When:
    sizes = SIZES[method]

    def when(args: tuple[Any, ...], call: int) -> bool:
        try:
            return sizes(*args).get(name, 0) > limit
        except (KeyError, TypeError, AttributeError):  # a config that is to be refused
            return False

    return when


# What the quick profile says that it does not reach (L-1).
_BEYOND = {
    ("attention", "positions"): 4096,
    ("attention", "sequences"): 4096,
    ("attention_backward", "positions"): 1024,
    ("forward_stacked", "adapters"): 4096,
    ("loss_gradients", "batches"): 4096,
    ("plan", "modules"): 512,
    ("plan", "targets"): 32,
    ("load", "modules"): 256,
}


def _reach(method: str, name: str) -> int:
    top = _BEYOND.get((method, name), 65536)
    return min(top, 4096) if method == "attention_backward" else top


def by_size() -> Iterator[Mutant]:
    """Right up to a limit in one dimension, wrong beyond it."""
    for method, sizes in _NAMES.items():
        for name in sizes:
            for limit in LIMITS:
                if limit > _reach(method, name):
                    continue
                for said, way in ways(method).items():
                    text = f"{method} with {name} > {limit}: {said}"
                    made = wrong(method, _size(method, name, limit), way)
                    yield _mutant("size", text, made, method)


_NAMES: dict[str, tuple[str, ...]] = {
    "forward": ("m", "k", "d", "r"),
    "base": ("m", "k", "d"),
    "backward": ("m", "k", "d", "r"),
    "loss_gradients": ("rows", "batches", "k", "d", "r"),
    "merge": ("d", "k", "r", "elements"),
    "unmerge": ("d", "k", "r", "elements"),
    "forward_stacked": ("m", "k", "d", "adapters", "rank"),
    "forward_mixed": ("m", "k", "d", "adapters", "rank", "segments", "rows of a segment"),
    "dropout_forward": ("m", "k", "d", "r", "elements"),
    "dropout_backward": ("m", "k", "d", "r", "elements"),
    "attention": ("positions", "sequences", "heads", "heads of a group", "key heads",
                  "size of a head", "inputs", "rank"),
    "attention_backward": ("positions", "heads", "heads of a group", "key heads",
                           "size of a head", "inputs", "rank"),
    "init": ("d", "k", "r", "elements"),
    "scaling": ("r",),
    "plan": ("modules", "rank", "targets"),
    "load": ("modules", "d", "k"),
}  # fmt: skip


def _first_array(args: tuple[Any, ...]) -> Any:
    for a in args:
        if isinstance(a, np.ndarray):
            return a
        if isinstance(a, list) and a and isinstance(a[0], tuple):
            return a[0][0]
    return None


_NARROW_TYPES = {"float64": np.float32, "float32": np.float16, "bfloat16": None}


def _narrowed(method: str, dtype: str, names: tuple[str, ...]) -> Way:
    """The call with some of its arrays rounded to a narrower dtype and back."""

    def rounded(a: Any) -> Any:
        to = _NARROW_TYPES[dtype]
        if to is not None:
            with np.errstate(over="ignore"):
                return a.astype(to).astype(a.dtype)
        bits = np.ascontiguousarray(a).view(np.uint16) & np.uint16(0xFFF0)  # 4 bits of 8
        return bits.view(a.dtype)

    def way(result: Any, args: Any, call: Any) -> Any:
        if method in ("attention", "attention_backward"):
            at = 2 if method == "attention_backward" else 1
            weights = {n: rounded(W) for n, W in args[at].items()}
            return call(*args[:at], weights, *args[at + 1 :])
        changed = [
            rounded(a) if i < len(ARRAYS[method]) and ARRAYS[method][i] in names else a
            for i, a in enumerate(args)
        ]
        return call(*changed)

    return way


def by_dtype() -> Iterator[Mutant]:
    """Wrong in one dtype alone: a result as in by_size, or arrays rounded to a narrower one."""
    for method in (*ARRAYS, "loss_gradients"):
        for dtype in _NARROW_TYPES:

            def when(args: tuple[Any, ...], call: int, dtype: str = dtype) -> bool:
                a = _first_array(args)
                return a is not None and str(a.dtype) == dtype

            for said, way in ways(method).items():
                text = f"{method} in {dtype}: {said}"
                yield _mutant("dtype", text, wrong(method, when, way), method)
            for name in ARRAYS.get(method, ()):
                if name and name != "rows":
                    way = _narrowed(method, dtype, (name,))
                    text = f"{method} in {dtype}: {name} is rounded to a narrower dtype"
                    yield _mutant("dtype", text, wrong(method, when, way), method)


def _misread(a: Any) -> Any:
    """The array as code reads it that takes its first address and thinks it contiguous."""
    memory = a
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    flat = np.frombuffer(memory.tobytes("A"), np.uint8)
    start = a.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    taken = np.resize(flat[start : start + a.nbytes], a.nbytes) if start < flat.size else flat
    return np.resize(taken, a.nbytes).view(a.dtype).reshape(a.shape).copy()


_LAYOUTS: dict[str, Callable[[Any], bool]] = {
    "not contiguous": lambda a: not a.flags.c_contiguous,
    "column-major": lambda a: a.flags.f_contiguous and not a.flags.c_contiguous,
    "of a negative stride": lambda a: any(s < 0 for s in a.strides),
    "of stride 0": lambda a: a.size > 1 and any(s == 0 for s in a.strides),
    "read-only": lambda a: not a.flags.writeable,
    "not aligned": lambda a: not a.flags.aligned,
    "a part of rows": lambda a: a.ndim == 2 and a.strides[1] == a.itemsize
    and not a.flags.c_contiguous and a.shape[0] > 1,
}  # fmt: skip


def by_layout() -> Iterator[Mutant]:
    """One argument, where it lies in memory in one way, is read as if it were contiguous, or is
    written to."""
    for method, names in ARRAYS.items():
        for at, name in enumerate(names):
            if not name:
                continue
            for said, is_so in _LAYOUTS.items():

                def when(
                    args: tuple[Any, ...], call: int, at: int = at, is_so: Any = is_so
                ) -> bool:
                    a = args[at] if at < len(args) else None
                    return isinstance(a, np.ndarray) and a.size > 0 and is_so(a)

                def read(result: Any, args: Any, call: Any, at: int = at) -> Any:
                    a = args[at]
                    same = bool(a.flags.c_contiguous)
                    other = -a if same and a.dtype.kind != "i" else _misread(a)
                    return call(*args[:at], other, *args[at + 1 :])

                text = f"{method}, {name} {said}: read as if it were contiguous"
                yield _mutant("layout", text, wrong(method, when, read), method)

                def write(result: Any, args: Any, call: Any, at: int = at) -> Any:
                    if args[at].flags.writeable:
                        args[at][...] = 0
                    return result

                if said not in ("read-only", "of stride 0"):
                    text = f"{method}, {name} {said}: overwritten"
                    yield _mutant("layout", text, wrong(method, when, write), method)


def by_call() -> Iterator[Mutant]:
    """Right at first, wrong from a call on, or at one call alone."""
    for method in _NAMES:
        for n in (2, 3, 5, 16, 64):
            for said, way in ways(method).items():
                for every in (False, True):

                    def when(
                        args: tuple[Any, ...], call: int, n: int = n, every: bool = every
                    ) -> bool:
                        return call % n == 0 if every else call > n

                    often = f"every {n} calls" if every else f"after {n} calls"
                    text = f"{method} {often}: {said}"
                    yield _mutant("call", text, wrong(method, when, way), method)


_VALUES: dict[str, Callable[[Any], bool]] = {
    "NaN": lambda a: bool(np.isnan(a.astype(np.float64)).any()),
    "infinity": lambda a: bool(np.isinf(a.astype(np.float64)).any()),
    "-0": lambda a: bool(((a == 0) & np.signbit(a.astype(np.float64))).any()),
    "subnormal numbers": lambda a: bool(
        ((a != 0) & (np.abs(a.astype(np.float64)) < np.finfo(np.float32).tiny)).any()
    ),
    "zeros alone": lambda a: a.size > 0 and not (a != 0).any(),
    "large numbers": lambda a: bool((np.abs(a.astype(np.float64)) > 1e6).any()),
    "a row of zeros": lambda a: a.ndim == 2 and a.size > 0 and bool((~(a != 0).any(axis=1)).any()),
}


def by_value() -> Iterator[Mutant]:
    """Wrong where an argument holds values of one kind, or the scale is one of a kind."""
    for method in ("forward", "backward", "merge", "dropout_forward", "dropout_backward"):
        names = ARRAYS[method]
        for at, name in enumerate(names):
            if not name:
                continue
            for said, is_so in _VALUES.items():

                def when(
                    args: tuple[Any, ...], call: int, at: int = at, is_so: Any = is_so
                ) -> bool:
                    a = args[at] if at < len(args) else None
                    return isinstance(a, np.ndarray) and a.dtype.kind != "c" and is_so(a)

                for how, way in ways(method).items():
                    text = f"{method}, {said} in {name}: {how}"
                    yield _mutant("value", text, wrong(method, when, way), method)
        scale = {"forward": 4, "backward": 5, "merge": 3}.get(method)
        for said, test in (
            ("0", lambda s: s == 0),
            ("negative", lambda s: s < 0),
            ("below 1", lambda s: 0 < s < 1),
            ("beyond 10", lambda s: s > 10),
            ("no power of 2", lambda s: s > 0 and np.log2(s) % 1 != 0),
        ):
            if scale is None:
                continue

            def scaled(args: tuple[Any, ...], call: int, at: int = scale, test: Any = test) -> bool:
                return bool(test(args[at]))

            for how, way in ways(method).items():
                text = f"{method}, scale {said}: {how}"
                yield _mutant("value", text, wrong(method, scaled, way), method)


def by_position() -> Iterator[Mutant]:
    """A row is given what belongs to its neighbour: the first two, the last two, in the middle."""
    spots: dict[str, Callable[[int], tuple[int, int]]] = {
        "first": lambda n: (0, 1),
        "last": lambda n: (n - 1, n - 2),
        "middle": lambda n: (n // 2, n // 2 - 1),
        "first of the last": lambda n: (0, n - 1),
        "seventh": lambda n: (7 % n, 6 % n),
    }
    for method in _NAMES:
        if method in ("scaling", "plan", "load", "init"):
            continue
        count = {"backward": 3, "dropout_backward": 3, "loss_gradients": 2}.get(method, 1)
        for axis in (0, 1):
            for said, spot in spots.items():
                for i in range(count):

                    def way(
                        result: Any, args: Any, call: Any, spot: Any = spot, axis: int = axis,
                        i: int = i,
                    ) -> Any:  # fmt: skip
                        def change(a: Any) -> Any:
                            b = a if axis == 0 or a.ndim < 2 else a.T
                            if len(b) > 1:
                                to, source = spot(len(b))
                                b[to] = b[source]
                            return a

                        return in_array(result, change, i)

                    lines = "column" if axis else "row"
                    text = f"{method}: of result {i} the {said} {lines} is its neighbour's"
                    made = wrong(method, lambda args, call: True, way)
                    yield _mutant("position", text, made, method)


def _mutant(kind: str, text: str, make: Callable[[], Any], method: str) -> Mutant:
    return Mutant(f"{kind}: {text}", kind, text, make, frozenset({method}))


KINDS: dict[str, Callable[[], Iterator[Mutant]]] = {
    "size": by_size,
    "dtype": by_dtype,
    "layout": by_layout,
    "call": by_call,
    "value": by_value,
    "position": by_position,
}


def mutants(kind: str) -> list[Mutant]:
    """All of one kind."""
    return list(KINDS[kind]())


def sample(every: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Some of them, drawn without order; all where fewer are there."""
    return random.Random(seed).sample(every, min(number, len(every)))
