"""Writes docs/mutants.md: each mutant, the law that kills it first, and after how many examples.

    python tools/mutant_table.py [--examples 100] [--seed 0] [--out docs/mutants.md]

Every law that concerns a mutant is run on it, in the order of docs/laws.md: some minutes on one
core. Exits with 1 if a mutant survives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pylora.conformance.laws.registry import LAWS
from pylora.conformance.mutants import GROUPS, Mutant, mutants
from pylora.conformance.mutants.hunt import kills
from pylora.conformance.running.runner import PROFILES, Outcome

FEW = 30  # examples of the laws after the one that kills first
HEAD = """# Mutants

The conformance kit is tested with {count} wrong implementations of LoRA. Each is the correct one
with as little changed as the bug needs (`pylora/conformance/mutants/`), and each is a bug that a
project had or could have: {gross} are gross and show in any result, {subtle} are subtle and need a
special input, a second call, or a look at the bits. {verdict} in the quick profile ({examples}
examples a law, seed {seed}).

    pylora conformance --mutants        # kills them all again, in less than a minute

*Killed by* is the first law in the order of [laws.md](laws.md); *at* is the number of the example
that it needed (the first is 1; nothing is shrunk); *also by* are later laws that kill it
within {few} examples. Made by `python tools/mutant_table.py`.
"""

NOT_CITED = [
    "\nTwo threads that the plan of this kit named are not here: huggingface/peft#3650, which was",
    "found to be about another cause, and vllm-project/vllm#59799, which was looked for twice, by",
    "number and by subject, and not found.",
]


def main() -> int:
    """Hunts, writes, and says what survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=PROFILES["quick"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/mutants.md"))
    args = parser.parse_args()
    found: dict[str, list[Outcome]] = {}
    for mutant in mutants():
        found[mutant.id] = hunt(mutant, args.examples, args.seed)
        print(mutant.id, *(f"{o.law.id}@{o.found_at}" for o in found[mutant.id]), flush=True)
    lost = [id for id, outcomes in found.items() if not outcomes]
    args.out.write_text(page(found, lost, args.examples, args.seed), encoding="utf-8")
    print(f"{args.out}: {len(found)} mutants, {len(lost)} survive {lost or ''}")
    return 1 if lost else 0


def hunt(mutant: Mutant, examples: int, seed: int) -> list[Outcome]:
    """The first law that kills it, and those of the later ones that need few examples."""
    first = next(kills(mutant, examples=examples, seed=seed), None)
    if first is None:
        return []
    later = list(LAWS.values())[list(LAWS).index(first.law.id) + 1 :]
    return [first, *kills(mutant, later, examples=FEW, seed=seed)]


def page(found: dict[str, list[Outcome]], lost: list[str], examples: int, seed: int) -> str:
    """The whole document."""
    every = mutants()
    gross = sum(m.kind == "gross" for m in every)
    verdict = f"These survive: {', '.join(lost)}" if lost else "None survives; each is killed"
    text = HEAD.format(
        count=len(every),
        gross=gross,
        subtle=len(every) - gross,
        verdict=verdict,
        few=FEW,
        examples=examples,
        seed=seed,
    )
    for group in GROUPS:
        members = [m for m in every if m.group == group.__name__]
        lines = [f"\n## {title(group.__doc__)}\n"]
        lines += ["| mutant | what it does | seen in | killed by | at | also by |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [row(m, found[m.id]) for m in members]
        text += "\n".join(lines) + "\n"
    return text + by_law(found) + threads(every)


def title(doc: str | None) -> str:
    return (doc or "").split("\n")[0].rstrip(".")


def row(mutant: Mutant, outcomes: list[Outcome]) -> str:
    """One mutant's line."""
    seen = f"[{mutant.thread}]({mutant.link})" if mutant.thread else ""
    kind = "" if mutant.kind == "gross" else " (subtle)"
    what = f"{mutant.sentence} *{mutant.story}*"
    first = (outcomes[0].law.id, str(outcomes[0].found_at)) if outcomes else ("**none**", "")
    also = ", ".join(o.law.id for o in outcomes[1:])
    cells = [f"`{mutant.id}`{kind}", what, seen, *first, also]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def by_law(found: dict[str, list[Outcome]]) -> str:
    """For each law, how many mutants it kills and which of them no other law kills."""
    lines = ["\n## By law\n", "| law | kills | kills alone |", "|---|---|---|"]
    for law in LAWS.values():
        mine = [id for id, outcomes in found.items() if any(o.law is law for o in outcomes)]
        alone = [id for id in mine if len(found[id]) == 1]
        lines.append(f"| {law.id} | {len(mine)} | {', '.join(f'`{id}`' for id in alone)} |")
    return "\n".join(lines) + "\n"


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
    sys.exit(main())
