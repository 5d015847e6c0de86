"""Regular expressions out of files from strangers: they match as Python's do, in bounded time.

Python's matcher tries every way to match before it says no, and a pattern can have exponentially
many. Most patterns are seen to have few (`_ways`): those run on Python's own matcher. The others
run on a matcher of ours over the same parsed pattern (stepwise.py), which counts its steps and
gives up, with an error that names the pattern, when they are too many for what it is used for.
No pattern is refused for its looks.
"""

from __future__ import annotations

import functools
import math
import re

from pylora.adapters.stepwise import Stepwise
from pylora.errors import PlanError

_MOST = 10_000_000  # ways to match; as many steps take about a second for all modules of a model
_PATH = 48  # characters of a module path
_TOKEN = re.compile(
    r"""(?P<name>\\[._-] | [\w-])
      | \\. | \[\^?\]?(?:\\.|[^\\\]])*\]      # other escapes, sets
      | \(\?[aiLmsux-]+\)                                      # flags: no group
      | (?P<open>\((?:\?(?:[:=!>]|<[=!]|P?<\w+>|[aiLmsux-]+:))?)
      | (?P<close>\)) | (?P<bar>\|)
      | (?P<many>(?:[*+]|\{\d*,\d*\})[?+]?)            # with what makes it lazy
      | (?P<times>\{\d+\}) | (?P<maybe>\?[?+]?) | .""",
    re.DOTALL | re.VERBOSE,
)

Pattern = re.Pattern[str] | Stepwise


@functools.lru_cache(maxsize=256)
def compiled(pattern: str, name: str, frame: tuple[str, str] = ("", "")) -> Pattern:
    """The compiled pattern between the two parts of `frame`; it has `match` and `fullmatch`.

    PlanError, which begins with `name`, if it is invalid (also by itself); its `match` raises one
    where matching takes more steps than any sensible pattern needs.
    """
    try:
        re.compile(pattern)
        result = re.compile(frame[0] + pattern + frame[1])
    except (re.error, OverflowError, RecursionError) as error:
        raise PlanError(f"{name}: {pattern!r} is not a regular expression: {error}") from None
    if _ways(result.pattern) <= _MOST:
        return result
    return Stepwise(result.pattern, f"{name}: {pattern!r}")


class _Group:
    """What is known of a group while it is read."""

    def __init__(self) -> None:
        self.branches = 1
        self.plain = True  # letters, digits and dots alone
        self.choice = False  # may match in more than one way

    def ways(self) -> int:
        """How many branches may match at the same place: of plain names, one."""
        return 1 if self.plain else self.branches


def _ways(pattern: str) -> float:
    """About how many ways there are to match a path: m repeats share its characters in
    C(_PATH + m, m) ways, each ? has two, a group of n branches that are not plain names has n. A
    repeated group that has a choice itself counts as infinitely many."""
    repeats, factor = 0, 1.0
    stack = [_Group()]
    closed: _Group | None = None  # the group that ended just before this token
    for token in _TOKEN.finditer(pattern):
        kind, group, ended = token.lastgroup, stack[-1], closed
        closed = None
        if kind == "open":
            stack.append(_Group())
        elif kind == "close":
            closed = stack.pop()
            factor *= closed.ways()
            stack[-1].choice |= closed.choice
            stack[-1].plain &= closed.plain and closed.branches == 1
        elif kind == "bar":
            group.branches += 1
            group.choice = True
        elif kind in ("many", "times") and ended is not None and ended.choice:
            return math.inf
        elif kind in ("many", "maybe"):
            repeats, factor = (repeats + 1, factor) if kind == "many" else (repeats, factor * 2)
            group.choice, group.plain = True, False
        elif kind != "name":
            group.plain = False
    return math.comb(_PATH + repeats, repeats) * factor * stack[0].ways()
