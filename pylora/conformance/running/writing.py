"""Writes a counterexample's program: what a trial remembers, as Python text."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from pylora.conformance import tracing
from pylora.conformance.laws.law import Law
from pylora.conformance.protocol import AttentionShape
from pylora.conformance.running.literals import layout, literal, nested, number
from pylora.conformance.running.objects import apart, began, pairs, same, within
from pylora.conformance.running.sources import Sources
from pylora.conformance.testcase import Call, Problem, Trial, Violation
from pylora.conformance.tracing import Key, Step, Traced, Write, plain
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
    "stored": ("W",),
}
TRIES = 20  # of a program that gives the law itself the problem: what hangs on chance needs luck
MARK = "implementation = "  # how the line begins that makes the implementation


class Writer:
    """One program; each method that makes one is called once."""

    def __init__(self, implementation: Any, trial: Trial) -> None:
        self.implementation, self.trial = implementation, trial
        self.imports = {"import numpy as np"}
        self.sources = Sources(self.imports)
        self.lines: list[str] = []
        self.names: dict[int, str] = {}  # id of an argument's array, or of a step -> variable
        self.content: dict[int, Array] = {}  # id of an argument's array -> what the program has
        self.keep: list[Any] = []  # ids stay valid while their objects live
        self.used: set[str] = {"implementation", "np", "directory", *(c.name for c in trial.calls)}

    def write(self, violation: Violation, title: str) -> str:
        """The program that makes the calls and compares."""
        self._directories()
        calls = self.trial.calls
        sides = [violation.source, violation.other, violation.want]
        wanted = [*sides, [c.arguments for c in calls]]
        for event in self._events(wanted):
            if isinstance(event, Call):
                self._call(event, violation, event is calls[-1])
            elif isinstance(event, Write):
                target, key = self._text(event.target), self._text(Key(event.key))
                self.lines.append(f"{target}[{key}] = {self._text(event.value)}")
            else:
                text = self._step(event)
                self.names[id(event)] = name = self._new("value")
                self.lines.append(f"{name} = {text}")
        if not violation.must_raise:
            self._compare(violation)
        return self._whole(title)

    def by_law(self, law: Law, problem: Problem, title: str) -> str:
        """The program that gives the law the problem."""
        self.imports.add("from pylora.conformance.laws.registry import LAWS")
        self.imports.add("from pylora.conformance.running.runner import attempt")
        self.imports.add("from pylora.conformance.testcase import Problem")
        first = [(c.arguments, c.before) for c in reversed(self.trial.calls)]
        before = {id(a): b for pair in first for a, b in pairs(*pair)}
        self.lines.append(f"problem = {self._value(problem, began(problem, before))}")
        self.lines.append(f"for _ in range({TRIES}):")
        self.lines.append(f"    attempt(implementation, LAWS[{law.id!r}], problem)")
        return self._whole(title)

    def by_search(self, law: Law, search: tuple[int, int], title: str) -> str:
        """The program that searches again: the problem alone is not enough."""
        self.imports.add("from pylora.conformance.laws.registry import LAWS")
        self.imports.add("from pylora.conformance.running.runner import run_law")
        more = f"examples={search[0]}, seed={search[1]}, shrink=False"
        self.lines += [
            "# The problem alone is too large to be written out, or fails only after other calls.",
            f"outcome = run_law(implementation, LAWS[{law.id!r}], {more})",
            "assert outcome.status == 'passed', outcome.reason",
        ]
        return self._whole(title)

    def _whole(self, title: str) -> str:
        made = self._make_implementation()
        head = [f"# {line}" for line in title.splitlines()]
        functions = [f"\n\n{text}\n" for text in self.sources.texts.values()]
        parts = [*head, *sorted(self.imports), *functions, "", made, *self.lines]
        return "\n".join(parts) + "\n"

    def _make_implementation(self) -> str:
        cls = type(self.implementation)
        module, name = cls.__module__, cls.__qualname__
        if "<locals>" in name or module == "__main__":
            return f"{MARK}{name.rpartition('.')[2]}()  # yours, from {module}"
        outer = name.split(".")[0]
        self.imports.add(f"from {module} import {outer}")
        return f"{MARK}{name}()"

    def _directories(self) -> None:
        for i, _ in enumerate(self.trial.directories):
            self.imports.add("import tempfile")
            self.lines.append(f"folder{i or ''} = tempfile.TemporaryDirectory()")
            self.lines.append(f"directory{i or ''} = folder{i or ''}.name")

    # ---- the order of things --------------------------------------------------------------------

    def _events(self, wanted: list[Any]) -> list[Any]:
        """The calls, and between them the steps that must be taken before a later call, and what
        the law wrote into a result."""
        calls: list[Any] = list(self.trial.calls)
        needed = [s for s in tracing.steps(wanted) if s.call is None]
        writes = [w for w in self.trial.writes if w.target.step is not None]
        marks = sorted(e.at for e in calls + writes)
        used: dict[int, list[int]] = {}  # id of a step -> when it is used

        def use(value: Any, at: int) -> None:
            if isinstance(value, Traced):
                value = value.step
            if isinstance(value, Step):
                used.setdefault(id(value), []).append(at)
            elif isinstance(value, Key):
                use(value.key, at)
            elif isinstance(value, (tuple, list)):
                for part in value:
                    use(part, at)
            elif isinstance(value, dict):
                use(tuple(value.values()), at)

        end = (marks[-1] if marks else 0) + 1
        use(wanted[:3], end)
        for call in calls:
            use(call.arguments, call.at)
        own = []
        for step in reversed(needed):
            when = used.get(id(step), [])
            apart = any(step.at < mark < at for mark in marks for at in when)
            if apart or len(when) > 1:
                own.append(step)
            for part in step.parts:
                use(part, step.at if apart or len(when) > 1 else max(when, default=step.at))
        return sorted(calls + writes + own, key=lambda e: e.at)

    def _call(self, call: Call, violation: Violation, last: bool) -> None:
        if call.owner == "file":
            self.imports.add("from pathlib import Path")
            path, data = self._value(call.arguments[0], call.before[0]), call.arguments[1]
            self.lines.append(f"Path({path}).parent.mkdir(parents=True, exist_ok=True)")
            self.lines.append(f"Path({path}).write_bytes({data!r})")
            return
        names = PARAMETERS.get(call.method, ())
        given = [
            self._value(a, b, names[j] if j < len(names) else "array")
            for j, (a, b) in enumerate(zip(call.arguments, call.before))
        ]
        if call.method == "unmerge" and len(given) == 4 and given[0].endswith("[0]"):
            given.append(f"*{given[0].removesuffix('[0]')}[1:]")
        text = f"{call.owner}.{call.method}({', '.join(given)})"
        if call.refused or (violation.must_raise and last):
            self.lines += ["try:", f"    {text}", "except Exception:", "    pass"]
            if not call.refused:
                self.lines += ["else:", f"    raise AssertionError({violation.what!r})"]
        else:
            self.lines.append(f"{call.name} = {text}")
            if call.method == "merge" and call.owner == "implementation":
                # One implementation returns the weight alone, and another a state as well.
                pair = f"{call.name} if isinstance({call.name}, tuple) else ({call.name},)"
                self.lines.append(f"{call.name} = {pair}")
        self._remember(call.arguments, call.after)

    def _remember(self, value: Any, after: Any) -> None:
        """What the program's arrays hold after a call, which may have written to them."""
        if isinstance(value, np.ndarray):
            if id(value) in self.content:
                self.content[id(value)] = after
        elif isinstance(value, (list, tuple)):
            for v, a in zip(value, after):
                self._remember(v, a)

    def _compare(self, v: Violation) -> None:
        if v.source is None or (v.want is None and not v.holds):
            return  # a call that raises; or nothing to compare, which is found out
        source = self._find(v.source) or self._text(v.source)
        if v.holds:
            other = "" if v.other is None else self._text(v.other)
            holds = v.holds.replace("RESULT", source).replace("OTHER", other)
            self.lines.append(f"assert {holds}, {v.what!r}")
            return
        got = source if v.at is None else f"{apart(source)}[{self._text(Key(v.at))}]"
        got += "".join(f"[{key!r}]" for key in v.item)
        bound = np.asarray(v.bound if v.bound is not None else 0.0)
        self.lines += [
            f"got = np.asarray({got})",
            f"want = np.asarray({self._wanted(v.want)})",
            f"bound = {literal(bound, self.imports)}",
            "print('got', got, 'expected', want, 'allowed error', bound, sep='\\n')",
            "as_wide = complex if np.iscomplexobj(got) else np.longdouble",
            "error = np.abs(got.astype(as_wide) - want.astype(as_wide))",
            "bad = ~((error <= bound) | (got == want) | ((got != got) & (want != want)))",
        ]
        if v.got.shape != np.shape(plain(v.want)):
            self.lines[-3:] = [f"assert got.shape == want.shape, {v.what!r}"]
            return
        if v.signs:
            self.lines.append("bad |= (got == want) & (np.signbit(got) != np.signbit(want))")
        self.lines.append(f"assert not bad.any(), {v.what!r}")

    def _wanted(self, want: Any) -> str:
        """What a law compares with, as an expression; a number that no call gave, as it is."""
        if isinstance(want, np.ndarray) and getattr(want, "step", None) is None:
            return self._find(want) or literal(plain(want), self.imports)
        return self._text(want)

    # ---- values ---------------------------------------------------------------------------------

    def _new(self, name: str) -> str:
        variable, n = name, 2
        while variable in self.used:
            variable, n = f"{name}{n}", n + 1
        self.used.add(variable)
        return variable

    def _text(self, value: Any, name: str = "array") -> str:
        """A value that a law compares or computes with."""
        if isinstance(value, Step):
            return self._step(value)
        if isinstance(value, Key):
            return self._key(value.key)
        if isinstance(value, Traced) and value.step is not None:
            return self._step(value.step)
        return self._value(value, plain(value), name)

    def _step(self, step: Step) -> str:
        if id(step) in self.names:
            return self.names[id(step)]
        if step.call is not None:
            name = step.call.name
            if step.call.method == "merge" and step.text == "{}":
                name += "[0]"
            return step.text.replace("{}", name, 1)
        names: tuple[str, ...] = ()
        text = step.text
        if step.function is not None:
            signature = inspect.signature(step.function)
            names = tuple(signature.parameters)
            text = self.sources.add(step.function) + text[len(step.function.__name__) :]
        parts = self._known(step.parts)
        texts = [
            self._text(part, names[i] if i < len(names) else "array")
            for i, part in enumerate(parts)
        ]
        operands = len(texts) if text.startswith(("{} ", "-{}")) else 0
        if text.startswith(("{}[", "{}.")):
            operands = 1
        texts[:operands] = [apart(t) for t in texts[:operands]]
        return text.format(*texts)

    def _known(self, value: Any) -> Any:
        """What a step is given: arrays that the program has under a name, where it has the same
        numbers. A step only reads, so which of two equal arrays it is given does not matter."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._known(v) for v in value)
        if not isinstance(value, np.ndarray) or isinstance(value, Traced) or self._find(value):
            return value
        for array in self.keep:
            like = self.content[id(array)]
            if like.dtype == value.dtype and same(like, value):
                return array
        return value

    def _key(self, key: Any) -> str:
        if isinstance(key, slice):
            parts = (key.start, key.stop, key.step)
            texts = ["" if v is None else self._key(v) for v in parts]
            return ":".join(texts if key.step is not None else texts[:2])
        if isinstance(key, tuple):
            return ", ".join(self._key(k) for k in key) + ("," if len(key) == 1 else "")
        if isinstance(key, np.ndarray) and not isinstance(key, Traced):
            return literal(key, self.imports)
        if key is Ellipsis:
            return "..."
        return self._text(key)

    def _find(self, value: Any) -> str | None:
        """The variable, or element of one, that is this very object."""
        if id(value) in self.names:
            return self.names[id(value)]
        for call in reversed(self.trial.calls):
            name = call.name
            if call.method == "merge" and not isinstance(call.result, tuple):
                name += "[0]"  # see _call
            found = within(call.result, value, name) or within(call.traced, value, name)
            if call.name and found:
                return found
        return None

    def _value(self, value: Any, before: Any, name: str = "array") -> str:
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        if isinstance(value, Traced) and value.step is not None:
            return self._step(value.step)
        known = self._find(value) if not isinstance(value, (float, str)) else None
        if known:
            given = before is not value and id(value) in self.content  # not a formula
            if given and not same(self.content[id(value)], before):
                self.lines.append(f"{known}[...] = {literal(before, self.imports)}")
                self.content[id(value)] = before
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
        if isinstance(value, Problem):
            fields = (
                f"{n}={self._value(v, getattr(before, n), n)}"
                for n, v in vars(value).items()
                if not callable(v)
            )
            return f"Problem({', '.join(fields)})"
        if isinstance(value, AttentionShape):
            self.imports.add("from pylora.conformance.protocol import AttentionShape")
        if isinstance(value, type) and issubclass(value, np.generic):
            if value.__module__ == "ml_dtypes":
                self.imports.add("import ml_dtypes")
                return f"ml_dtypes.{value.__name__}"
            return f"np.{value.__name__}"
        if isinstance(value, type) and value in (float, int, bool, complex):
            return value.__name__
        if isinstance(value, np.dtype):
            return self._value(value.type, None)
        if isinstance(value, np.generic):
            return (
                f"np.{value.dtype}({nested(value)})" if value.dtype.kind in "fiu" else repr(value)
            )
        if isinstance(value, float):
            return number(value)
        return repr(value)

    def _array(self, value: Array, before: Array, name: str) -> str:
        variable = self._new(name)
        self.names[id(value)] = variable
        self.content[id(value)] = before
        self.keep.append(value)
        self.lines.append(f"{variable} = {literal(before, self.imports)}")
        self.lines += layout(variable, value)
        return variable
