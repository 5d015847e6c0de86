"""Writes the list of statements in docs/porting.md that the golden vectors show.

    python tools/vector_table.py           writes it
    python tools/vector_table.py --check   says whether it is right

Behind each statement stands how many outputs and answers show it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pylora.conformance.vectors.all import all_cases, all_questions
from pylora.conformance.vectors.cases import Case
from pylora.conformance.vectors.score import score

PAGE = Path(__file__).resolve().parents[1] / "docs" / "porting.md"
BEGIN, END = "<!-- statements: begin -->\n", "<!-- statements: end -->\n"


def listed(cases: list[Case] | None = None) -> str:
    """The list, a letter a line; of these cases, or of all, made now."""
    with tempfile.TemporaryDirectory() as nothing:
        found = score(nothing, cases or all_cases(), all_questions()).statements()
    lines: dict[str, list[str]] = {}
    for name, counts in found.items():
        lines.setdefault(name.split("-")[0], []).append(f"{name} ({sum(counts.values())})")
    return "".join(f"- {', '.join(names)}\n" for names in lines.values())


def stale(cases: list[Case] | None = None) -> str | None:
    """What the page should hold, where it holds something else."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    old, after = rest.split(END)
    new = listed(cases)
    return None if old == new else f"{before}{BEGIN}{new}{END}{after}"


def main() -> int:
    text = stale()
    if "--check" in sys.argv[1:]:
        print("docs/porting.md is as it should be" if text is None else "docs/porting.md is stale")
        return int(text is not None)
    if text is not None:
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
