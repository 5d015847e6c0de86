"""Writes docs/mutants.md, the list of the mutants, from what each says of itself.

    python tools/mutant_table.py [--out docs/mutants.md]

No mutant is run here: the tests and `pylora conformance --mutants` do that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pylora.conformance.mutants import GROUPS, Mutant, mutants

HEAD = """# Mutants

The conformance kit is tested with {count} wrong implementations of LoRA. Each is the correct one
with as little changed as the bug needs (`pylora/conformance/mutants/`), and each is a bug that a
project had or could have: {gross} are gross and show in any result, {subtle} are subtle and need a
special input, a second call, or a look at the bits. A test asks of each that a law of the quick
profile finds it out, and that the program printed for it fails on the mutant and passes on the
right implementation; a part of them in each run of the tests, all of them every night.

    pylora conformance --mutants        # kills them all, and says which law did, in some minutes

How many more are made by a machine, and what of them is found, is in
[conformance.md](conformance.md). Made by `python tools/mutant_table.py`.
"""

NOT_CITED = [
    "\nTwo threads that the plan of this kit named are not here: huggingface/peft#3650, which was",
    "found to be about another cause, and vllm-project/vllm#59799, which was looked for twice, by",
    "number and by subject, and not found.",
]


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/mutants.md"))
    parser.parse_args().out.write_text(page(), encoding="utf-8")


def page() -> str:
    """The whole document."""
    every = mutants()
    gross = sum(m.kind == "gross" for m in every)
    text = HEAD.format(count=len(every), gross=gross, subtle=len(every) - gross)
    for group in GROUPS:
        members = [m for m in every if m.group == group.__name__]
        lines = [f"\n## {title(group.__doc__)}\n"]
        lines += ["| mutant | what it does | seen in |", "|---|---|---|"]
        lines += [row(m) for m in members]
        text += "\n".join(lines) + "\n"
    return text + threads(every)


def title(doc: str | None) -> str:
    return (doc or "").split("\n")[0].rstrip(".")


def row(mutant: Mutant) -> str:
    """One mutant's line."""
    seen = f"[{mutant.thread}]({mutant.link})" if mutant.thread else ""
    kind = "" if mutant.kind == "gross" else " (subtle)"
    cells = [f"`{mutant.id}`{kind}", f"{mutant.sentence} *{mutant.story}*", seen]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def threads(every: tuple[Mutant, ...]) -> str:
    """The public threads, and the mutants that have the same fault."""
    lines = [
        "\n## Public threads\n",
        "Reports of the same fault in other projects, each looked up before it was put here. A",
        "mutant is not that project's code, and most of these faults are mended there.\n",
    ]
    cited = sorted({m.thread for m in every if m.thread}, key=str.lower)
    for thread in cited:
        same = [m for m in every if m.thread == thread]
        lines.append(f"- [{thread}]({same[0].link}): {', '.join(f'`{m.id}`' for m in same)}")
    lines += NOT_CITED
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
