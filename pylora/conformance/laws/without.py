"""The statements of docs/spec.md that no law checks, each with the reason: none. A test holds this
list: every statement is cited by a law or is in it, and none is both."""

from __future__ import annotations

WITHOUT: dict[str, str] = {}


def table() -> str:
    """The list in Markdown, for docs/laws.md."""
    lines = ["| statement | why no law checks it |", "|---|---|"]
    return "\n".join([*lines, *(f"| {id} | {why} |" for id, why in WITHOUT.items())]) + "\n"
