"""The demo's answers as tables: right and wrong ones are marked, and no wrong one is left out."""

from __future__ import annotations

from pylora.demo.items import Items, exact_match, expected, right, statement
from pylora.display.console import Console

_FIRST = 10  # items that are shown, right or wrong
_MISSES = 20  # of the others, those that are wrong; all are in generations.jsonl
_HEAD = ("statement", "expected", "before", "after", "")


def show_answers(screen: Console, items: Items, before: list[str], after: list[str]) -> None:
    """The first items, the other ones that were missed, and how many of all are right."""
    rows = [
        (statement(item), expected(item), _short(b), _short(a), mark(right(item, a)))
        for item, b, a in zip(items, before, after, strict=True)
    ]
    screen.table(_HEAD, rows[:_FIRST], title=f"The first {min(_FIRST, len(rows))}")
    others = list(zip(items, after, rows, strict=True))[_FIRST:]
    missed = [row for item, a, row in others if not right(item, a)]
    if missed:
        some = "" if len(missed) <= _MISSES else f" (the first {_MISSES} of {len(missed)})"
        screen.table(_HEAD, missed[:_MISSES], title=f"Misses among the others{some}")
    shares = [f"{exact_match(items, texts):.1%}" for texts in (before, after)]
    screen.table(
        ("exact match", "before", "after"),
        [(f"{len(items)} held-out statements", *shares)],
        right=("before", "after"),
    )


def mark(is_right: bool) -> str:
    """A sign and a word, so that neither colour nor the font decides what is understood."""
    return "✓ right" if is_right else "✗ wrong"


def _short(text: str, most: int = 28) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
