"""A counterexample as a NumPy program that shows the failure alone: literal arrays, the calls in
order, and the comparison. Nothing of this package is imported but what the calls themselves need.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pylora.conformance.protocol import AttentionShape
from pylora.conformance.testcase import Trial, Violation
from pylora.types import Array

PARAMETERS = {
    "forward": ("x", "W", "A", "B", "scale", "bias"),
    "base": ("x", "W", "bias"),
    "backward": ("dy", "x", "W", "A", "B", "scale"),
    "merge": ("W", "A", "B", "scale"),
    "unmerge": ("merged", "A", "B", "scale", "state"),
    "dropout_forward": ("x", "W", "A", "B", "scale", "p", "seed"),
    "dropout_backward": ("dy", "x", "W", "A", "B", "scale", "p", "seed"),
    "forward_stacked": ("x", "W", "adapters", "bias"),
    "forward_mixed": ("x", "W", "adapters", "rows", "bias"),
    "attach": ("A", "B", "scale"),
    "module": ("W", "bias"),
}


def program(implementation: Any, trial: Trial, violation: Violation, title: str) -> str:
    """Python source that ends with an AssertionError while the failure is there."""
    return _Writer(implementation, trial).write(violation, title)


class _Writer:
    def __init__(self, implementation: Any, trial: Trial) -> None:
        self.implementation, self.trial = implementation, trial
        self.imports = {"import numpy as np"}
        self.lines: list[str] = []
        self.names: dict[int, str] = {}  # id of an argument's array -> variable
        self.keep: list[Any] = []  # ids stay valid while their objects live
        self.used: set[str] = {"implementation", "np", "directory"}

    def write(self, violation: Violation, title: str) -> str:
        made = self._make_implementation()
        for i, directory in enumerate(self.trial.directories):
            self.imports.add("import tempfile")
            self.lines.append(f"directory{i or ''} = tempfile.mkdtemp()")
            del directory
        last = len(self.trial.calls) - 1
        for i, call in enumerate(self.trial.calls):
            if call.owner == "file":
                self.imports.add("from pathlib import Path")
                path, data = self._value(call.arguments[0], call.before[0]), call.arguments[1]
                self.lines.append(f"Path({path}).parent.mkdir(parents=True, exist_ok=True)")
                self.lines.append(f"Path({path}).write_bytes({data!r})")
                continue
            names = PARAMETERS.get(call.method, ())
            arguments = [
                self._value(a, b, names[j] if j < len(names) else "array")
                for j, (a, b) in enumerate(zip(call.arguments, call.before))
            ]
            text = f"{call.owner}.{call.method}({', '.join(arguments)})"
            self.used.add(call.name)
            if violation.must_raise and i == last:
                self.lines += ["try:", f"    {text}", "except Exception:", "    pass", "else:"]
                self.lines.append(f"    raise AssertionError({violation.what!r})")
            else:
                self.lines.append(f"{call.name} = {text}")
        if not violation.must_raise:
            self._compare(violation)
        head = [f"# {line}" for line in title.splitlines()]
        return "\n".join([*head, *sorted(self.imports), "", made, *self.lines]) + "\n"

    def _make_implementation(self) -> str:
        cls = type(self.implementation)
        module, name = cls.__module__, cls.__qualname__
        if "<locals>" in name or module == "__main__":
            return f"implementation = {name.rpartition('.')[2]}()  # yours, from {module}"
        outer = name.split(".")[0]
        self.imports.add(f"from {module} import {outer}")
        return f"implementation = {name}()"

    def _compare(self, v: Violation) -> None:
        source = self._find(v.source)
        if v.holds and source is not None:
            self.lines.append(f"assert {v.holds.replace('RESULT', source)}, {v.what!r}")
            return
        if v.want is None or source is None:
            self.lines.append(f"raise AssertionError({v.what!r})")
            return
        got = source if v.at is None else f"{source}[{_index(v.at)}]"
        got += "".join(f"[{key!r}]" for key in v.item)
        want, bound = np.asarray(v.want), np.asarray(v.bound if v.bound is not None else 0.0)
        self.lines += [
            f"got = np.asarray({got})",
            f"want = {self._literal(want)}",
            f"bound = {self._literal(bound)}",
            "print('got', got, 'expected', want, 'allowed error', bound, sep='\\n')",
            "wide = complex if np.iscomplexobj(got) else float",
            "error = np.abs(got.astype(wide) - want.astype(wide))",
            "bad = ~((error <= bound) | (got == want) | ((got != got) & (want != want)))",
        ]
        if not v.error <= v.allowed and v.error == float("inf"):
            self.lines.append("bad |= np.signbit(got.real) != np.signbit(want.real)")
        self.lines.append(f"assert not bad.any(), {v.what!r}")

    def _find(self, value: Any) -> str | None:
        """The variable, or element of one, that is this very object."""
        if id(value) in self.names:
            return self.names[id(value)]
        for call in reversed(self.trial.calls):
            if call.name:
                found = _within(call.result, value, call.name)
                if found:
                    return found
        return None

    def _value(self, value: Any, before: Any, name: str = "array") -> str:
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        known = self._find(value) if not isinstance(value, (float, str)) else None
        if known:
            return known
        if isinstance(value, np.ndarray):
            return self._array(value, before, name)
        if isinstance(value, (list, tuple)):
            letters = ("A", "B", "scale") if len(value) == 3 else ("A", "B")
            parts = [
                self._value(v, b, letters[i] if isinstance(value, tuple) and i < 2 else name)
                for i, (v, b) in enumerate(zip(value, before))
            ]
            inner = ", ".join(parts)
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(parts) == 1 else f"({inner})"
        if isinstance(value, dict):
            items = (f"{k!r}: {self._value(v, before[k], name)}" for k, v in value.items())
            return "{" + ", ".join(items) + "}"
        if isinstance(value, str):
            for i, directory in enumerate(self.trial.directories):
                if value.startswith(directory):
                    rest = value[len(directory) :]
                    return f"directory{i or ''}" + (f" + {rest!r}" if rest else "")
            return repr(value)
        if isinstance(value, AttentionShape):
            self.imports.add("from pylora.conformance.protocol import AttentionShape")
        if isinstance(value, float):
            return _number(value)
        return repr(value)

    def _array(self, value: Array, before: Array, name: str) -> str:
        variable, n = name, 2
        while variable in self.used:
            variable, n = f"{name}{n}", n + 1
        self.used.add(variable)
        self.names[id(value)] = variable
        self.keep.append(value)
        self.lines.append(f"{variable} = {self._literal(before)}")
        self.lines += _layout(variable, value)
        return variable

    def _literal(self, a: Array) -> str:
        if str(a.dtype) == "bfloat16":
            self.imports.add("import ml_dtypes")
            dtype = "ml_dtypes.bfloat16"
        elif str(a.dtype) == "longdouble" or a.dtype.itemsize > 16 or str(a.dtype) == "float128":
            a, dtype = a.astype(np.float64), "np.float64"
        else:
            dtype = f"np.{a.dtype}" if a.dtype != bool else "bool"
        if a.size == 0:
            return f"np.zeros({a.shape}, {dtype})"
        if a.size > 4 and (a == a.flat[0]).all() and not (a == 0).all():
            return f"np.full({a.shape}, {_nested(a.flat[0])}, {dtype})"
        return f"np.array({_nested(a)}, {dtype})"


def _nested(a: Array) -> str:
    a = np.asarray(a)
    if a.ndim == 0:
        v = a.item() if a.dtype.kind in "iubc" else float(a)
        return _number(v) if isinstance(v, float) else repr(v)
    return "[" + ", ".join(_nested(np.asarray(row)) for row in a) + "]"


def _number(v: float) -> str:
    if v != v:
        return "np.nan"
    if v in (float("inf"), float("-inf")):
        return "np.inf" if v > 0 else "-np.inf"
    return repr(float(v))


def _layout(name: str, a: Array) -> list[str]:
    """Lines that give a C-contiguous literal the strides and the flag of `a`."""
    lines = []
    if a.ndim and any(s < 0 for s in a.strides):
        flip = ", ".join("::-1" if s < 0 else ":" for s in a.strides)
        lines.append(f"{name} = np.ascontiguousarray({name}[{flip}])[{flip}]")
    elif a.size and not a.flags.c_contiguous:
        if a.ndim == 2 and a.flags.f_contiguous:
            lines.append(f"{name} = np.asfortranarray({name})")
        else:
            step = ", ".join(["::2"] * a.ndim)
            grown = name
            for axis in range(a.ndim):
                grown = f"np.repeat({grown}, 2, axis={axis})"
            lines.append(f"{name} = {grown}[{step}]")
    if not a.flags.writeable:
        lines.append(f"{name}.flags.writeable = False")
    return lines


def _within(container: Any, value: Any, name: str) -> str | None:
    if container is value:
        return name
    items: list[tuple[Any, Any]] = []
    if isinstance(container, (list, tuple)):
        items = list(enumerate(container))
    elif isinstance(container, dict):
        items = list(container.items())
    for key, item in items:
        found = _within(item, value, f"{name}[{key!r}]")
        if found:
            return found
    return None


def _index(at: Any) -> str:
    if isinstance(at, slice):
        parts = [("" if v is None else repr(v)) for v in (at.start, at.stop)]
        return ":".join(parts)
    if isinstance(at, np.ndarray):
        return f"np.array({at.tolist()!r})"
    if isinstance(at, tuple):
        return ", ".join(_index(i) for i in at)
    return repr(at)
