"""Data sets for training's objectives, made from the demo's notation: preferences, verdicts,
classes, numbers.

    python bench/objective_data.py OUT

writes OUT/{pairs,verdicts,classes,numbers}.{train,test}.jsonl. The demo's records translate a
sentence into symbols. A rejected answer is the right one with one mistake of a kind that a model
makes: two sides exchanged, a negation lost or put in, a symbol taken for another, a relation taken
for another, the end left out. Every number comes from a seed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTATION = Path(__file__).parents[1] / "pylora" / "demo" / "data" / "notation"
RELATIONS = "⇒≡∧∨"
CLASSES = ("implication", "equality", "conjunction", "disjunction", "negation")
Record = dict[str, Any]


def notation(split: str) -> list[Record]:
    """The demo's records of "train", "validation" or "test"."""
    text = (NOTATION / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def symbols(records: list[Record]) -> str:
    """All symbols of things that occur."""
    return "".join(sorted({c for r in records for c in r["completion"] if c.isalpha() or c == "∅"}))


def mistaken(answer: str, things: str, draw: random.Random) -> str:
    """The answer with one mistake: always another text."""
    right = answer.strip()
    parts = re.split(f"([{RELATIONS}])", right)

    def exchanged() -> str:
        return "".join(reversed(parts))

    def negated() -> str:
        return right.replace("¬", "").strip("()") if "¬" in right else f"¬({right})"

    def other_thing() -> str:
        at = draw.choice([i for i, c in enumerate(right) if c in things])
        return right[:at] + draw.choice(things.replace(right[at], "")) + right[at + 1 :]

    def other_relation() -> str:
        places = [i for i, c in enumerate(right) if c in RELATIONS]
        at = draw.choice(places)
        return right[:at] + draw.choice(RELATIONS.replace(right[at], "")) + right[at + 1 :]

    def cut_short() -> str:
        return "".join(parts[:-2])

    ways: list[Callable[[], str]] = [negated, other_thing]
    if len(parts) > 1:
        ways += [other_relation]
        ways += [exchanged] if "¬" not in right and parts[0] != parts[-1] else []
        ways += [cut_short] if "(" not in right else []
    wrong = right
    while wrong == right:
        wrong = draw.choice(ways)()
    return f" {wrong}"


def class_of(answer: str) -> int:
    """The number of the class in CLASSES: what the sentence says first of all."""
    if "¬" in answer:
        return 4
    return min((answer.index(c), "⇒≡∧∨".index(c)) for c in RELATIONS if c in answer)[1]


def made(seed: int = 0) -> dict[str, dict[str, list[Record]]]:
    """{"pairs": {"train": [...], "test": [...]}, ...}"""
    draw = random.Random(seed)
    things = symbols(notation("train"))
    out: dict[str, dict[str, list[Record]]] = {
        k: {} for k in ("pairs", "verdicts", "classes", "numbers")
    }
    for split in ("train", "test"):
        records = notation(split) + (notation("validation") if split == "test" else [])
        wrong = [mistaken(r["completion"], things, draw) for r in records]
        out["pairs"][split] = [
            {"prompt": r["prompt"], "chosen": r["completion"], "rejected": w}
            for r, w in zip(records, wrong)
        ]
        good = [draw.random() < 0.5 for _ in records]
        out["verdicts"][split] = [
            {"prompt": r["prompt"], "completion": r["completion"] if g else w, "label": g}
            for r, w, g in zip(records, wrong, good)
        ]
        related = [r for r in records if any(c in r["completion"] for c in RELATIONS + "¬")]
        out["classes"][split] = [
            {"text": r["prompt"].removesuffix(" →"), "label": class_of(r["completion"])}
            for r in related
        ]
        out["numbers"][split] = [
            {
                "text": r["prompt"].removesuffix(" →"),
                "label": float(len(r["completion"].strip())),
            }
            for r in records
        ]
    return out


def write(folder: Path, seed: int = 0) -> None:
    """One file for each kind and split."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, splits in made(seed).items():
        for split, records in splits.items():
            lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
            (folder / f"{kind}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
