"""Writes docs/mutants.md: each mutant, a law that kills it, and after how many examples.

    python tools/mutant_table.py [--seed 0] [--jobs N] [--out docs/mutants.md]

Each mutant is hunted as the tests do it (mutants/hunt.py): some minutes on two cores. Exits with 1
if one survives.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from pylora.conformance.laws.registry import LAWS
from pylora.conformance.mutants import GROUPS, Mutant, mutants
from pylora.conformance.mutants.hunt import killer

Kill = tuple[str, int] | None  # the law's id and the number of the example
HEAD = """# Mutants

The conformance kit is tested with {count} wrong implementations of LoRA. Each is the correct one
with as little changed as the bug needs (`pylora/conformance/mutants/`), and each is a bug that a
project had or could have: {gross} are gross and show in any result, {subtle} are subtle and need a
special input, a second call, or a look at the bits. {verdict} in the quick profile (seed {seed}).

    pylora conformance --mutants        # kills them all again, in some minutes

*Killed by* is a law that finds it out: cheap laws and few examples are tried first, so it is not
the only one. *At* is the number of the example that it needed (the first is 1; nothing is shrunk).
Made by `python tools/mutant_table.py`.
"""

NOT_CITED = [
    "\nTwo threads that the plan of this kit named are not here: huggingface/peft#3650, which was",
    "found to be about another cause, and vllm-project/vllm#59799, which was looked for twice, by",
    "number and by subject, and not found.",
]


def main() -> int:
    """Hunts, writes, and says what survived."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("docs/mutants.md"))
    args = parser.parse_args()
    every = mutants()
    found: dict[str, Kill] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        one = partial(hunt, seed=args.seed)
        for mutant, kill in zip(every, pool.map(one, range(len(every)))):
            found[mutant.id] = kill
            print(f"{mutant.id:40} {f'{kill[0]} at {kill[1]}' if kill else 'SURVIVES'}", flush=True)
    lost = [id for id, kill in found.items() if not kill]
    args.out.write_text(page(found, lost, args.seed), encoding="utf-8")
    print(f"{args.out}: {len(found)} mutants, {len(lost)} survive {lost or ''}")
    return 1 if lost else 0


def hunt(number: int, seed: int) -> Kill:
    """What kills the mutant with this number."""
    outcome = killer(mutants()[number], seed=seed)
    return None if outcome is None else (outcome.law.id, outcome.found_at or 0)


def page(found: dict[str, Kill], lost: list[str], seed: int) -> str:
    """The whole document."""
    every = mutants()
    gross = sum(m.kind == "gross" for m in every)
    verdict = f"These survive: {', '.join(lost)}" if lost else "None survives; each is killed"
    text = HEAD.format(
        count=len(every), gross=gross, subtle=len(every) - gross, verdict=verdict, seed=seed
    )
    for group in GROUPS:
        members = [m for m in every if m.group == group.__name__]
        lines = [f"\n## {title(group.__doc__)}\n"]
        lines += ["| mutant | what it does | seen in | killed by | at |", "|---|---|---|---|---|"]
        lines += [row(m, found[m.id]) for m in members]
        text += "\n".join(lines) + "\n"
    return text + by_law(found) + threads(every)


def title(doc: str | None) -> str:
    return (doc or "").split("\n")[0].rstrip(".")


def row(mutant: Mutant, kill: Kill) -> str:
    """One mutant's line."""
    seen = f"[{mutant.thread}]({mutant.link})" if mutant.thread else ""
    kind = "" if mutant.kind == "gross" else " (subtle)"
    what = f"{mutant.sentence} *{mutant.story}*"
    law, at = kill if kill else ("**none**", "")
    cells = [f"`{mutant.id}`{kind}", what, seen, law, str(at)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def by_law(found: dict[str, Kill]) -> str:
    """The laws that killed, and how many each."""
    lines = ["\n## By law\n", "| law | kills in this table |", "|---|---|"]
    for law in LAWS:
        count = sum(kill is not None and kill[0] == law for kill in found.values())
        if count:
            lines.append(f"| {law} | {count} |")
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
