"""One example of one law: calls the implementation, checks what comes back, remembers every call.

A law receives a `Trial` in place of the implementation. Its methods are the protocol's; it raises
`Broken` where the implementation raises or returns something of the wrong form, `Violation` where a
result is not what the law asks. What it remembers becomes the counterexample's program.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance import forms, tracing
from pylora.conformance.bounds import moves
from pylora.conformance.protocol import METHODS, precision_of
from pylora.conformance.tracing import plain, values
from pylora.types import Array


class Problem:
    """The drawn input of a law: named arrays and numbers."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this problem has no {name}; it has {', '.join(vars(self))}")

    def __repr__(self) -> str:
        def show(v: Any) -> str:
            return f"{v.dtype}{list(v.shape)}" if isinstance(v, np.ndarray) else repr(v)

        return "Problem(" + ", ".join(f"{k}={show(v)}" for k, v in vars(self).items()) + ")"

    def replaced(self, **fields: Any) -> Problem:
        """The same problem with some fields exchanged."""
        return Problem(**{**vars(self), **fields})


class NotTested(Exception):
    """The law does not apply to what this implementation offers; the text says why."""


class Broken(Exception):
    """The implementation raised, or what it returned has the wrong form: `holds` then says in
    Python what RESULT, which is `source`, should be like."""

    def __init__(self, said: str, source: Any = None, holds: str = "") -> None:
        super().__init__(said)
        self.source, self.holds = source, holds


@dataclass(eq=False)
class Violation(Exception):
    """A result that the law forbids: what, where, and by how much."""

    what: str
    got: Any = None
    want: Any = None
    bound: Any = None
    at: Any = None  # index into the result that `got` is
    source: Any = None  # the result itself, to be found among the calls
    item: tuple[Any, ...] = ()  # keys that lead from the result to the number that is compared
    holds: str = ""  # in place of a comparison: Python for what should hold of RESULT and OTHER
    other: Any = None
    error: float = float("nan")
    allowed: float = float("nan")
    must_raise: bool = False
    signs: bool = False  # whether +0 and -0 differ

    def __str__(self) -> str:
        return self.what

    @property
    def ratio(self) -> float:
        """error / bound; infinite where nothing is allowed."""
        if not self.error >= 0:
            return float("inf")
        return self.error / self.allowed if self.allowed > 0 else float("inf")


@dataclass(eq=False)
class Call:
    """One call: the arguments as they were before it."""

    owner: str  # variable that the method belongs to
    method: str
    arguments: tuple[Any, ...]
    before: tuple[Any, ...]  # copies
    result: Any = None
    traced: Any = None  # the same, as the law has it
    name: str = "result"  # variable for the result
    after: tuple[Any, ...] = ()  # copies of the arguments, taken when it had returned
    refused: bool = False  # it raised, as it may
    at: int = field(default_factory=tracing.now)


@dataclass(eq=False)
class Trial:
    """An implementation under one example of a law. See the file's header."""

    implementation: Any
    calls: list[Call] = field(default_factory=list)
    ratio: float = 0.0  # largest error / bound seen, of bounds that are not zero
    notes: dict[str, bool] = field(default_factory=dict)
    directories: list[str] = field(default_factory=list)
    writes: list[Any] = field(default_factory=list)  # of the law, into results

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)
        return lambda *arguments: self.call(self.implementation, "implementation", name, arguments)

    def call(self, owner: Any, variable: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """Calls owner.method(*arguments), remembers it, and checks the form of the result."""
        given = plain(arguments)
        call = Call(variable, method, arguments, snapshot(given), name=self._name(method))
        self.calls.append(call)
        try:
            result = getattr(owner, method)(*given)
        except NotImplementedError as error:
            raise NotTested(f"{method} says NotImplementedError: {error}") from error
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())[:300]
            raise Broken(f"{method} raised {type(error).__name__}: {text}") from error
        finally:
            call.after = snapshot(given)
        call.result = result
        if variable == "implementation":
            check_form(method, given, result)
        _inputs_kept(call, given)
        if method in ("module", "decoder"):
            return ModuleTrial(self, result, call.name)
        call.traced = tracing.result(result, call, self.writes)
        return call.traced

    def must_raise(self, why: str, method: str, *arguments: Any) -> None:
        """Violation unless the call raises an Exception."""
        given = plain(arguments)
        call = Call("implementation", method, arguments, snapshot(given), name="result")
        self.calls.append(call)
        try:
            call.result = getattr(self.implementation, method)(*given)
        except Exception:
            return
        raise Violation(f"{method} accepted {why}; it must raise", must_raise=True)

    def expect(
        self,
        what: str,
        got: Any,
        want: Any,
        bound: Any = 0.0,
        at: Any = None,
        signs: bool = False,
        item: tuple[Any, ...] = (),
    ) -> None:
        """Violation unless |got[at] - want| <= bound everywhere. NaN equals NaN, inf itself.

        With `signs` +0 and -0 differ. `item`: keys that lead from `got` to a number in it.
        """
        source, given = got, want
        got = got if at is None else plain(got)[plain(at)]
        for key in item:  # first: of a plan of thousands of modules each is asked by itself
            got = got[key]
        got = plain(got)
        g, w = values(np.asarray(got)), values(np.asarray(plain(want)))
        if g.shape != w.shape:
            said = f"{what}: shape {g.shape}, expected {w.shape}"
            raise Violation(said, g, given, 0.0, at, source, item)
        g, w = _comparable(g), _comparable(w)
        with np.errstate(all="ignore"):
            error = np.abs(g - w)
            error = np.where((g == w) | (np.isnan(g) & np.isnan(w)), 0.0, error)
            error = np.where(np.isnan(error), np.inf, error).astype(np.float64)
            if signs and g.dtype.kind == "f":
                error = np.where((error == 0) & (np.signbit(g) != np.signbit(w)), np.inf, error)
        bound = values(np.asarray(plain(bound)))
        limit = np.broadcast_to(bound.astype(np.float64), error.shape)
        bad = error > limit
        if not bad.any():
            positive = limit > 0
            if positive.any():
                self.ratio = max(self.ratio, float((error[positive] / limit[positive]).max()))
            return
        rank = np.where(bad, error / np.maximum(limit, 1e-300), -1)
        where = np.unravel_index(int(np.argmax(rank)), error.shape)
        text = f"{what}{[int(i) for i in where] if where else ''}"
        text += f": got {g[where]!s}, expected {w[where]!s}"
        count = f" ({int(bad.sum())} of {bad.size} elements are out)" if bad.size > 1 else ""
        raise Violation(
            text + count,
            np.asarray(got),
            given,
            bound,
            at,
            source,
            item,
            error=float(error[where]),
            allowed=float(limit[where]),
            signs=signs,
        )

    def fail(self, what: str, got: Any = None, holds: str = "") -> None:
        """A violation that is no comparison of numbers; `holds` says in Python what RESULT, which
        is `got`, should be like."""
        raise Violation(what, got, source=got, holds=holds)

    def apart(self, what: str, result: Any, other: Any) -> None:
        """Violation if two arrays share memory."""
        a, b = plain(result), plain(other)
        if np.may_share_memory(a, b) and np.shares_memory(a, b):
            holds = "not np.shares_memory(RESULT, OTHER)"
            raise Violation(what, result, source=result, holds=holds, other=other)

    @property
    def bitwise(self) -> bool:
        """Whether the implementation promises bits. A BLAS may choose other kernels for the same
        numbers elsewhere in memory, so from others only the bound can be asked."""
        return getattr(self.implementation, "bitwise", False) is True

    @property
    def precision(self) -> str:
        """How it stores and multiplies W; see bounds/moves.py."""
        return precision_of(self.implementation)

    @property
    def exact(self) -> bool:
        """Whether its products of small integers are exact, so that equality can be asked for."""
        return moves.exact(self.precision)

    def weight(self, W: Array) -> Array:
        """The weight that the implementation multiplies by, where it stores W in fewer bits."""
        if not callable(getattr(self.implementation, "stored", None)):
            return W
        try:
            kept = self.implementation.stored(W)
        except NotImplementedError as error:
            raise NotTested(f"stored says NotImplementedError: {error}") from error
        except Exception as error:
            raise Broken(f"stored raised {type(error).__name__}: {error}") from error
        check_form("stored", (W,), kept)
        return np.asarray(kept)

    def note(self, what: str, holds: bool) -> None:
        """Counted over the examples and reported; no verdict hangs on it."""
        self.notes[what] = self.notes.get(what, True) and holds

    def directory(self) -> str:
        """A new empty temporary directory, removed when the example is over."""
        self.directories.append(tempfile.mkdtemp(prefix="pylora-conformance-"))
        return self.directories[-1]

    def write(self, path: str, data: bytes) -> None:
        """Writes a file as part of the example."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(data)
        self.calls.append(Call("file", "write", (path, data), (path, data), name=""))

    def close(self) -> None:
        """Removes the example's directories."""
        for directory in self.directories:
            shutil.rmtree(directory, ignore_errors=True)

    def _name(self, method: str) -> str:
        stem = {"forward": "y", "base": "y", "backward": "gradients", "merge": "merged"}
        name = stem.get(method, "module" if method == "module" else "result")
        count = sum(c.name.rstrip("0123456789") == name for c in self.calls)
        return f"{name}{count + 1}" if count else name


class ModuleTrial:
    """A module or a decoder of the implementation, its calls remembered like the others."""

    def __init__(self, trial: Trial, module: Any, name: str) -> None:
        self._trial, self._module, self._name = trial, module, name

    def has(self, method: str) -> bool:
        return callable(getattr(self._module, method, None))

    def quietly(self, method: str, *arguments: Any) -> None:
        """A call that is not remembered: one of thousands whose results nobody looks at."""
        try:
            getattr(self._module, method)(*arguments)
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise Broken(f"{method} raised {type(error).__name__}: {text}") from error

    def __getattr__(self, method: str) -> Any:
        if not self.has(method):
            raise NotTested(f"the object has no {method}()")
        return lambda *arguments: self._trial.call(self._module, self._name, method, arguments)


def snapshot(value: Any) -> Any:
    """A copy of the arrays in nested lists, tuples and dicts, with their layout."""
    if isinstance(value, np.ndarray):
        copy = np.copy(value, order="K")
        copy.flags.writeable = value.flags.writeable
        return copy
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(v) for v in value)
    if isinstance(value, Mapping):
        return {k: snapshot(v) for k, v in value.items()}
    return value


def _inputs_kept(call: Call, given: tuple[Any, ...]) -> None:
    """Violation if the call wrote to an argument (spec F-8)."""
    for array, before in zip(_arrays(given), _arrays(call.before)):
        if array.tobytes() != before.tobytes():
            said = f"{call.method} wrote to an argument, an array of shape {array.shape}"
            raise Violation(said, array, before, 0.0, source=array, signs=True)


def _arrays(value: Any) -> Iterator[Array]:
    """The arrays in lists, tuples and dicts."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _arrays(v)
    elif isinstance(value, Mapping):
        yield from _arrays(list(value.values()))


def _comparable(a: Array) -> Array:
    if a.dtype.kind in "fiub" and a.dtype.itemsize > 8:
        return a
    if a.dtype.kind == "c":
        return a
    return a.astype(np.float64)


# ---- the form of a result ------------------------------------------------------------------------


def _array(what: str, a: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if not isinstance(a, np.ndarray):
        said = f"{what} is {type(a).__module__}.{type(a).__name__}, expected a NumPy array"
        raise Broken(said, a, "isinstance(RESULT, np.ndarray)")
    if a.shape != shape:
        said = f"{what} has shape {a.shape}, expected {shape}"
        raise Broken(said, a, f"RESULT.shape == {shape}")
    if dtype is not None and a.dtype != dtype:
        said = f"{what} has dtype {a.dtype}, expected {np.dtype(dtype)}"
        raise Broken(said, a, f"str(RESULT.dtype) == {str(np.dtype(dtype))!r}")


def _tuple(what: str, value: Any, *lengths: int) -> Any:
    if not isinstance(value, (tuple, list)) or len(value) not in lengths:
        size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        said = f"{what} is {type(value).__name__}{size}, expected a tuple of {lengths[0]}"
        raise Broken(said, value, f"len(RESULT) in {lengths}")
    return value


def check_form(method: str, args: tuple[Any, ...], result: Any) -> None:
    """Broken unless the result has the types, shapes and dtype of the protocol."""
    if method in ("forward", "base", "dropout_forward", "forward_stacked", "forward_mixed"):
        x, W = args[:2]
        _array(f"the result of {method}", result, (x.shape[0], W.shape[0]), x.dtype)
    elif method in ("backward", "dropout_backward"):
        _, x, W, A, B = args[:5]
        parts = _tuple(f"the result of {method}", result, 3, 4)
        for name, part, like in zip(("dx", "dA", "dB"), parts, (x, A, B)):
            _array(f"{name} of {method}", part, like.shape, like.dtype)
        if len(parts) == 4 and parts[3] is not None:
            _array(f"dW of {method}", parts[3], W.shape, None)
    elif method == "loss_gradients":
        for name, part, like in zip("AB", _tuple("the result", result, 2), args[2:4]):
            _array(f"d{name} of {method}", part, like.shape, like.dtype)
    elif method == "init":
        d, k, r = args[:3]
        A, B = _tuple("the result of init", result, 2)
        _array("A of init", A, (r, k), None)
        _array("B of init", B, (d, r), None)
    elif method == "scaling":
        if isinstance(result, bool) or not np.isscalar(result):
            raise Broken(f"scaling returned {type(result).__name__}, expected a number")
    elif method in ("merge", "unmerge", "stored"):
        if method == "merge" and isinstance(result, tuple):
            result = _tuple("the result of merge", result, 2)[0]
        _array(f"the result of {method}", result, args[0].shape, args[0].dtype)
    elif method in ("load", "plan"):
        if not isinstance(result, Mapping):
            raise Broken(f"{method} returned {type(result).__name__}, expected a dict by path")
        for path, entry in result.items():
            _tuple(f"{method}()[{path!r}]", entry, 3)
    elif method == "attention":
        _array("the result of attention", result, args[0].shape, args[0].dtype)
    elif method == "attention_backward":
        dx, grads = _tuple("the result of attention_backward", result, 2)
        _array("dx of attention_backward", dx, args[1].shape, args[1].dtype)
        if not isinstance(grads, Mapping) or set(grads) != set(args[3]):
            raise Broken("attention_backward must return gradients of exactly the adapters given")
        for name, pair in grads.items():
            for letter, part, like in zip("AB", _tuple(name, pair, 2), args[3][name]):
                _array(f"d{letter} of {name}", part, like.shape, like.dtype)
    elif method == "module":
        for need in ("forward", "attach", "detach"):
            if not callable(getattr(result, need, None)):
                raise Broken(f"the module has no method {need}")
    elif method == "decoder":
        if not callable(getattr(result, "extend", None)):
            raise Broken("the decoder has no method extend")
    else:
        _form(f"the result of {method}", forms.form(method, args), result)


def _form(what: str, form: Any, result: Any) -> None:
    """Broken unless the result has this form; see forms.py."""
    if isinstance(form, forms.Form):
        _array(what, result, form.shape, form.dtype)
    elif isinstance(form, (tuple, list)):
        for i, (part, one) in enumerate(zip(_tuple(what, result, len(form)), form)):
            _form(f"element {i} of {what}", one, part)
    elif isinstance(form, dict):
        if not isinstance(result, Mapping) or set(result) != set(form):
            raise Broken(f"{what} must be a dict of {', '.join(form)}")
        for name, one in form.items():
            _form(f"{name!r} of {what}", one, result[name])
