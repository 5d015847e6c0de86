"""A matcher of regular expressions that counts its steps and gives up.

It runs the syntax tree that Python's own compiler makes of a pattern, in Python's order of
preference, so that it finds what `re` would find. Slow, and only for the few patterns that cannot
be seen to be harmless (patterns.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from pylora.errors import PlanError

if sys.version_info >= (3, 11):
    from re import _constants as op
    from re import _parser as parser
else:  # the same two modules, by their older names
    import sre_constants as op
    import sre_parse as parser

MOST_STEPS = 30_000  # for one path: a hundred times what a sensible pattern needs

Groups = dict[int, tuple[int, int]]
Next = Callable[[int, Groups], "Groups | None"]


class Found:
    """What matched: the parts of a re.Match that callers use."""

    def __init__(self, text: str, groups: Groups, names: dict[str, int]) -> None:
        self._text, self._groups, self._names = text, groups, names

    def __getitem__(self, group: int | str) -> str | None:
        number = self._names[group] if isinstance(group, str) else group
        if number not in self._groups:
            return None
        start, end = self._groups[number]
        return self._text[start:end]


class Stepwise:
    """A pattern. `match` and `fullmatch` are those of re.Pattern; PlanError for too many steps."""

    def __init__(self, pattern: str, name: str) -> None:
        self.pattern, self._name = pattern, name
        self._tree: Any = parser.parse(pattern)
        self._flags = int(self._tree.state.flags)
        self._names: dict[str, int] = dict(self._tree.state.groupdict)
        self._steps = 0
        self._sets: dict[tuple[str, int], re.Pattern[str]] = {}

    def match(self, text: str) -> Found | None:
        """At the start of the text."""
        return self._run(text, lambda at, groups: groups | {0: (0, at)})

    def fullmatch(self, text: str) -> Found | None:
        """The whole text."""
        return self._run(text, lambda at, g: g | {0: (0, at)} if at == len(text) else None)

    def _run(self, text: str, end: Next) -> Found | None:
        self._steps = 0
        try:
            groups = _Run(self, text).sequence(list(self._tree), 0, self._flags, 0, {}, end)
        except RecursionError:
            raise self.gave_up() from None
        return None if groups is None else Found(text, groups, self._names)

    def step(self) -> None:
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise self.gave_up()

    def gave_up(self) -> PlanError:
        return PlanError(
            f"{self._name} takes exponential time to match: more than {MOST_STEPS} steps for one "
            "module path; write it without a repeat inside of a repeat"
        )


class _Run:
    """One text being matched. Every method calls `then(position, groups)` for each way to match,
    the preferred one first, until one gives groups."""

    def __init__(self, owner: Stepwise, text: str) -> None:
        self.owner, self.text = owner, text

    def sequence(
        self, items: list[Any], i: int, flags: int, at: int, groups: Groups, then: Next
    ) -> Groups | None:
        if i == len(items):
            return then(at, groups)
        return self.one(
            items[i],
            flags,
            at,
            groups,
            lambda a, g: self.sequence(items, i + 1, flags, a, g, then),
        )

    def one(self, item: Any, flags: int, at: int, groups: Groups, then: Next) -> Groups | None:
        self.owner.step()
        code, args = item
        if code in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN):
            hit = at < len(self.text) and self.character(item, flags, self.text[at])
            return then(at + 1, groups) if hit else None
        if code is op.AT:
            return then(at, groups) if self.at(args, flags, at) else None
        if code is op.BRANCH:
            for branch in args[1]:
                found = self.sequence(list(branch), 0, flags, at, groups, then)
                if found is not None:
                    return found
            return None
        if code is op.SUBPATTERN:
            number, add, remove, inner = args
            inside = (flags | add) & ~remove

            def close(end: int, g: Groups) -> Groups | None:
                return then(end, g if number is None else g | {number: (at, end)})

            return self.sequence(list(inner), 0, inside, at, groups, close)
        if code in (op.MAX_REPEAT, op.MIN_REPEAT):
            low, high, inner = args
            lazy = code is op.MIN_REPEAT
            return self.repeat(list(inner), low, high, lazy, flags, at, groups, then, 0, -1)
        return self.special(code, args, flags, at, groups, then)

    def repeat(
        self,
        items: list[Any],
        low: int,
        high: int,
        lazy: bool,
        flags: int,
        at: int,
        groups: Groups,
        then: Next,
        done: int,
        last: int,
    ) -> Groups | None:
        self.owner.step()

        def once_more() -> Groups | None:
            if done >= high or (done >= low and at == last):  # an empty turn is not repeated
                return None
            return self.sequence(
                items,
                0,
                flags,
                at,
                groups,
                lambda a, g: self.repeat(items, low, high, lazy, flags, a, g, then, done + 1, at),
            )

        if done < low:
            return once_more()
        if lazy:
            found = then(at, groups)
            return once_more() if found is None else found
        found = once_more()
        return then(at, groups) if found is None else found

    def special(
        self, code: Any, args: Any, flags: int, at: int, groups: Groups, then: Next
    ) -> Groups | None:
        """Look-around, groups without a way back, references to groups."""
        name = str(code)
        if name in ("ASSERT", "ASSERT_NOT"):
            direction, inner = args
            start = at if direction >= 0 else at - inner.getwidth()[0]
            found = None
            if start >= 0:
                stay: Next = (
                    (lambda a, g: g) if direction >= 0 else (lambda a, g: g if a == at else None)
                )
                found = self.sequence(list(inner), 0, flags, start, groups, stay)
            if name == "ASSERT":
                return None if found is None else then(at, found)
            return then(at, groups) if found is None else None
        if name in ("ATOMIC_GROUP", "POSSESSIVE_REPEAT"):
            ends: list[int] = []

            def stop(a: int, g: Groups) -> Groups | None:
                ends.append(a)
                return g

            if name == "ATOMIC_GROUP":
                found = self.sequence(list(args), 0, flags, at, groups, stop)
            else:
                low, high, inner = args
                found = self.repeat(list(inner), low, high, False, flags, at, groups, stop, 0, -1)
            return None if found is None else then(ends[-1], found)
        if name in ("GROUPREF", "GROUPREF_EXISTS"):
            number = args if name == "GROUPREF" else args[0]
            if name == "GROUPREF_EXISTS":
                branch = args[1] if number in groups else args[2]
                return self.sequence(list(branch or ()), 0, flags, at, groups, then)
            if number not in groups:
                return None
            start, end = groups[number]
            said, here = self.text[start:end], self.text[at : at + end - start]
            if flags & re.IGNORECASE:
                said, here = said.lower(), here.lower()
            return then(at + end - start, groups) if said == here else None
        raise PlanError(f"{self.owner._name} uses {name}, which is not supported; write it simpler")

    def character(self, item: Any, flags: int, c: str) -> bool:
        """Whether one character fits; by Python's own matcher, so that cases and classes agree."""
        code, args = item
        if not flags & re.IGNORECASE:
            if code is op.LITERAL:
                return ord(c) == int(args)
            if code is op.NOT_LITERAL:
                return ord(c) != int(args)
        if code is op.ANY:
            return bool(flags & re.DOTALL) or c != "\n"
        return self.in_set(item, flags).fullmatch(c) is not None

    def in_set(self, item: Any, flags: int) -> re.Pattern[str]:
        kept = flags & (re.IGNORECASE | re.ASCII)
        key = (repr(item), kept)
        if key not in self.owner._sets:
            self.owner._sets[key] = re.compile(_written(item), kept)
        return self.owner._sets[key]

    def at(self, where: Any, flags: int, at: int) -> bool:
        name, text = str(where), self.text
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            many = name == "AT_BEGINNING" and flags & re.MULTILINE
            return at == 0 or bool(many and text[at - 1] == "\n")
        if name == "AT_END_STRING":
            return at == len(text)
        if name == "AT_END":
            if at == len(text) or text[at:] == "\n":
                return True
            return bool(flags & re.MULTILINE and text[at] == "\n")
        edge = _word(text[at - 1 : at], flags) != _word(text[at : at + 1], flags)
        return edge if name == "AT_BOUNDARY" else not edge


def _word(c: str, flags: int) -> bool:
    return re.fullmatch(r"\w", c, flags & re.ASCII) is not None


_CATEGORY = {
    "CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S", "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W",
}  # fmt: skip


def _written(item: Any) -> str:
    """One character's condition as a pattern again."""
    code, args = item
    if code is op.LITERAL:
        return f"[{_escaped(args)}]"
    if code is op.NOT_LITERAL:
        return f"[^{_escaped(args)}]"
    parts, no = "", ""
    for kind, value in args:
        if kind is op.NEGATE:
            no = "^"
        elif kind is op.LITERAL:
            parts += _escaped(value)
        elif kind is op.RANGE:
            parts += f"{_escaped(value[0])}-{_escaped(value[1])}"
        else:
            parts += _CATEGORY[str(value)]
    return f"[{no}{parts}]"


def _escaped(code: int) -> str:
    return f"\\U{code:08x}"
