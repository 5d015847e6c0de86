"""A table as lines of text: columns aligned, the last ones broken where a terminal is narrow.

Widths are those of a terminal's cells: a combining mark takes none, an East Asian wide one two.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence

_GAP = "  "
_LEAST = 16  # cells that a column keeps when others need room


def cells(text: str) -> int:
    """How many cells of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def lines(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    right: Sequence[str] = (),
    width: int | None = None,
    rule: str = "─",
) -> list[str]:
    """Header, a rule and the rows. The columns named in `right` are aligned to the right.

    Without a width every row is one line. With one, texts are broken between words where the rows
    would not fit: the last column first, then the widest, as far as `_LEAST` cells.
    """
    texts = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    widths = [
        max([cells(name), *(cells(row[i]) for row in texts)]) for i, name in enumerate(columns)
    ]
    if width is not None:
        _narrow(widths, [cells(name) for name in columns], width - len(_GAP) * (len(columns) - 1))
    out = [_line(columns, widths, columns, right), _GAP.join(rule * w for w in widths)]
    for row in texts:
        parts = [
            [text] if cells(text) <= w else textwrap.wrap(text, max(1, w)) or [""]
            for text, w in zip(row, widths, strict=True)
        ]
        for i in range(max(map(len, parts), default=0)):
            line = [part[i] if i < len(part) else "" for part in parts]
            out.append(_line(line, widths, columns, right))
    return out


def _narrow(widths: list[int], least: list[int], room: int) -> None:
    """Takes cells from the widest column until the sum is `room`, or none has any to give."""
    while sum(widths) > room:
        able = [i for i, w in enumerate(widths) if w > max(_LEAST, least[i])]
        if not able:
            return
        last = len(widths) - 1  # a sentence, as a rule, where the others are names and figures
        widest = last if last in able else max(able, key=lambda i: widths[i])
        floor = max(_LEAST, least[widest])
        widths[widest] = max(floor, widths[widest] - (sum(widths) - room))


def _line(
    texts: Sequence[str], widths: Sequence[int], columns: Sequence[str], right: Sequence[str]
) -> str:
    out = []
    for text, width, column in zip(texts, widths, columns, strict=True):
        space = " " * max(0, width - cells(text))
        out.append(space + text if column in right else text + space)
    return _GAP.join(out).rstrip()
