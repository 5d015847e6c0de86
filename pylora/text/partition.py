"""Special tokens are cut out of a text before the rest of it is tokenized, as llama.cpp does it.

Longer tokens are looked for first, in the whole text, then the shorter ones in what is left.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_SPACES = " \t\n\v\f\r"


@dataclass(frozen=True)
class Special:
    """A token that is matched in the text as it is written."""

    text: str
    id: int
    eats_spaces: bool = False  # those behind it belong to it


Fragment = tuple[int, int, int | None]  # begin, end, and the id if the fragment is a special token


class Partition:
    """Finds special tokens. Work: one search for each token whose first character occurs."""

    def __init__(self, specials: Iterable[Special]) -> None:
        ordered = sorted((s for s in specials if s.text), key=lambda s: -len(s.text.encode()))
        self._specials: dict[str, list[tuple[int, Special]]] = {}
        for rank, special in enumerate(ordered):
            self._specials.setdefault(special.text[0], []).append((rank, special))

    def cut(self, text: str) -> list[Fragment]:
        """The fragments of `text`, in order; those that are no special token are never empty."""
        found = [
            pair
            for first, pairs in self._specials.items()
            if first in text
            for pair in pairs
            if pair[1].text in text
        ]
        fragments: list[Fragment] = [(0, len(text), None)] if text else []
        for _, special in sorted(found, key=lambda pair: pair[0]):
            fragments = [
                part
                for fragment in fragments
                for part in (
                    [fragment] if fragment[2] is not None else _cut(text, fragment, special)
                )
            ]
        return fragments


def _cut(text: str, fragment: Fragment, special: Special) -> list[Fragment]:
    begin, end, _ = fragment
    parts: list[Fragment] = []
    while (at := text.find(special.text, begin, end)) >= 0:
        if at > begin:
            parts.append((begin, at, None))
        begin = at + len(special.text)
        parts.append((at, begin, special.id))
        while special.eats_spaces and begin < end and text[begin] in _SPACES:
            begin += 1
    if begin < end:
        parts.append((begin, end, None))
    return parts
