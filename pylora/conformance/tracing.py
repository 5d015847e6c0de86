"""Arrays that remember how they came about, so that a counterexample can compute them again.

A `Trial` hands a law the implementation's results as `Traced` arrays. What a law does with them
(sums, slices, copies, the oracle's formulas) makes further traced arrays, each with the `Step` that
led to it: a text with gaps, and what goes into the gaps. running/counterexample.py writes the steps
that lead to the comparison. Where a law leaves this notation, as float() does, the trace ends and
the number itself is written; the program is tried out before it is printed, and another is printed
where that was wrong.

An implementation is never given a traced array: `plain` takes the trace off.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pylora.types import Array

_clock = itertools.count()


def now() -> int:
    """A number that grows: calls, steps and writes are put in order by it."""
    return next(_clock)


@dataclass(eq=False)
class Step:
    """How a value came about: `text` with {} for each of `parts`."""

    text: str
    parts: tuple[Any, ...]
    at: int = field(default_factory=now)
    call: Any = None  # of a result: the call that gave it
    function: Callable[..., Any] | None = None  # of a formula: the function itself


@dataclass(eq=False)
class Write:
    """target[key] = value, done by the law."""

    target: Traced
    key: Any
    value: Any
    at: int = field(default_factory=now)


class Key:
    """What stands between [ and ]."""

    def __init__(self, key: Any) -> None:
        self.key = key


class Traced(np.ndarray):
    """See the file's header. `step` is None where the trace was lost."""

    step: Step | None = None
    raw: Any = None  # the object that the implementation returned, where it is one
    log: list[Any] | None = None  # where what the law writes into it is noted

    def __array_finalize__(self, obj: Any) -> None:
        self.step = self.raw = self.log = None

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kw: Any) -> Any:
        outs = kw.pop("out", None)
        given = [plain(i) for i in inputs]
        options = {k: plain(v) for k, v in kw.items()}
        if outs is not None:
            getattr(ufunc, method)(*given, out=tuple(plain(o) for o in outs), **options)
            for out in outs:
                if isinstance(out, Traced):
                    out.step = None
            return outs[0] if len(outs) == 1 else outs
        result = getattr(ufunc, method)(*given, **options)
        name = ufunc.__name__
        if method == "__call__" and name in _SIGNS and not kw and len(inputs) == 2:
            return traced(result, Step("{} " + _SIGNS[name] + " {}", inputs), inputs)
        if method == "__call__" and name == "negative" and not kw:
            return traced(result, Step("-{}", inputs), inputs)
        what = f"np.{name}" + ("" if method == "__call__" else f".{method}")
        return traced(result, _called(what, inputs, kw), inputs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        result = func(*plain(args), **plain(kwargs))
        name = getattr(func, "__name__", "")
        known = getattr(np, name, None) is func
        return traced(result, _called(f"np.{name}", args, kwargs) if known else None, args)

    def __getitem__(self, key: Any) -> Any:
        result = np.ndarray.__getitem__(self.view(np.ndarray), plain(key))
        return traced(result, Step("{}[{}]", (self, Key(key))), (self,))

    def __setitem__(self, key: Any, value: Any) -> None:
        np.ndarray.__setitem__(self.view(np.ndarray), plain(key), plain(value))
        if self.log is None:
            self.step = None
        else:
            self.log.append(Write(self, key, value))

    def __round__(self, digits: int = 0) -> Any:
        return round(float(self), digits)


_SIGNS = {
    "add": "+", "subtract": "-", "multiply": "*", "divide": "/", "matmul": "@", "equal": "==",
    "not_equal": "!=", "less": "<", "less_equal": "<=", "greater": ">", "greater_equal": ">=",
}  # fmt: skip
_METHODS = (
    "copy", "astype", "reshape", "view", "ravel", "transpose", "sum", "mean", "max", "min", "any",
    "all", "squeeze",
)  # fmt: skip


def _called(what: str, args: tuple[Any, ...], kw: Mapping[str, Any]) -> Step:
    gaps = ["{}"] * len(args) + [f"{name}={{}}" for name in kw]
    return Step(f"{what}({', '.join(gaps)})", (*args, *kw.values()))


def _method(name: str) -> Callable[..., Any]:
    def method(self: Traced, *args: Any, **kw: Any) -> Any:
        of = getattr(np.ndarray, name)
        result = of(self.view(np.ndarray), *plain(args), **plain(kw))
        step = _called(f"{{}}.{name}", args, kw)
        return traced(result, Step(step.text, (self, *step.parts)), (self,))

    return method


for _name in _METHODS:
    if _name != "view":  # which the functions above take the trace off with
        setattr(Traced, _name, _method(_name))
Traced.T = property(  # type: ignore[assignment]
    lambda self: traced(self.view(np.ndarray).T, Step("{}.T", (self,)), (self,))
)


def traced(value: Any, step: Step | None, like: Any = ()) -> Any:
    """`value` with its step, if it is an array or a number of NumPy's."""
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    made = np.asarray(value).view(Traced)
    made.step, made.raw = step, value if isinstance(value, np.ndarray) else None
    made.log = next((a.log for a in like if isinstance(a, Traced) and a.log is not None), None)
    return made


def result(value: Any, call: Any, log: list[Any], path: str = "") -> Any:
    """What a call returned, its arrays traced, in tuples, lists and dicts too."""
    if isinstance(value, np.ndarray):
        made = traced(value, Step("{}" + path, (call,), call=call))
        made.log = log
        return made
    if type(value) in (tuple, list):
        return type(value)(result(v, call, log, f"{path}[{i}]") for i, v in enumerate(value))
    if type(value) is dict:
        return {k: result(v, call, log, f"{path}[{k!r}]") for k, v in value.items()}
    return value


def plain(value: Any) -> Any:
    """Without trace: the very object that an implementation returned, where it is one."""
    if isinstance(value, Traced):
        return value.raw if value.raw is not None else np.ndarray.view(value, np.ndarray)
    if type(value) in (tuple, list):
        if any(_has(v) for v in value):
            return type(value)(plain(v) for v in value)
        return value
    if type(value) is dict and any(_has(v) for v in value.values()):
        return {k: plain(v) for k, v in value.items()}
    return value


def _has(value: Any) -> bool:
    """Whether something in it is traced."""
    if isinstance(value, Traced):
        return True
    if type(value) in (tuple, list):
        return any(_has(v) for v in value)
    return type(value) is dict and any(_has(v) for v in value.values())


def formula(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays and numbers whose source goes into the program, and its call."""

    @functools.wraps(function)
    def call(*args: Any, **kw: Any) -> Any:
        value = function(*plain(args), **plain(kw))
        step = _called("{}", args, kw)
        step = Step(function.__name__ + step.text[2:], step.parts, function=call)
        if isinstance(value, tuple):
            return tuple(traced(v, Step(f"{{}}[{i}]", (step,))) for i, v in enumerate(value))
        return traced(value, step)

    return call


def steps(value: Any) -> list[Step]:
    """Every step that `value` hangs on, those first that came first."""
    found: dict[int, Step] = {}

    def visit(v: Any) -> None:
        if isinstance(v, Traced):
            v = v.step
        if isinstance(v, Step):
            if id(v) in found:
                return
            found[id(v)] = v
            for part in v.parts:
                visit(part)
        elif isinstance(v, Key):
            visit(v.key)
        elif isinstance(v, (tuple, list)):
            for part in v:
                visit(part)
        elif isinstance(v, dict):
            for part in v.values():
                visit(part)

    visit(value)
    return sorted(found.values(), key=lambda s: s.at)


def values(array: Array) -> Array:
    """The numbers of an array, traced or not, as an array that is not."""
    a: Array = np.ndarray.view(array, np.ndarray) if isinstance(array, Traced) else array
    return a
