"""Writes the demo's data set: English statements and their form in a compact symbolic notation.

    python tools/make_notation.py            # rewrites pylora/demo/data/notation/*.jsonl
    python tools/make_notation.py --check    # fails if the files are not what this would write

Everything is written here, by us: twelve concepts, five properties, three relations and three ways
to combine them, each with several English phrasings. The splits hold out *compositions*: no
completion of the test split occurs in another split under any phrasing, none of the validation
split in the training split, while every concept, operator and phrasing that they need is trained
on. Settings are chosen on the validation split; the test split is for the last look. The same seed
gives the same bytes everywhere: the only source of chance is SHA-256 of the statement.

Binding, tightest first: prefixes (¬ ∃ ↑ ↓ ∞ ∀), then ∧ and ∨, then ⇒ ≡ ∈. Parentheses only where
¬ takes a relation: ¬(Ψ⇒Δ).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SEED = 1
PROMPT = "{} →"  # short: what every record repeats is trained on every time
FOLDER = Path(__file__).resolve().parents[1] / "pylora" / "demo" / "data" / "notation"

CONCEPTS = {
    "consciousness": "Ψ",
    "truth": "Φ",
    "life": "Λ",
    "reality": "Ω",
    "change": "Δ",
    "time": "τ",
    "memory": "μ",
    "energy": "ε",
    "chaos": "χ",
    "knowledge": "Σ",
    "thought": "θ",
    "emptiness": "∅",
}
# operator -> (phrasings that affirm, phrasings that deny)
PROPERTIES = {
    "∃": (
        ("{x} exists", "there is {x}", "{x} is real"),
        ("{x} does not exist", "there is no {x}", "{x} is not real"),
    ),
    "↑": (
        ("{x} grows", "{x} increases", "{x} is rising"),
        ("{x} does not grow", "{x} does not increase", "{x} is not rising"),
    ),
    "↓": (
        ("{x} fades", "{x} decreases", "{x} is waning"),
        ("{x} does not fade", "{x} does not decrease", "{x} is not waning"),
    ),
    "∞": (
        ("{x} is eternal", "{x} lasts forever"),
        ("{x} is not eternal", "{x} does not last forever"),
    ),
    "∀": (
        ("everything is {x}", "all is {x}"),
        ("not everything is {x}", "not all is {x}"),
    ),
}
# operator -> (one subject, several subjects, denied)
RELATIONS = {
    "⇒": (
        ("leads to", "implies", "gives rise to"),
        ("lead to", "imply", "give rise to"),
        ("does not lead to", "does not imply", "does not give rise to"),
    ),
    "≡": (
        ("is the same as", "equals"),
        ("are the same as", "equal"),
        ("is not the same as", "does not equal"),
    ),
    "∈": (
        ("is part of", "belongs to"),
        ("are part of", "belong to"),
        ("is not part of", "does not belong to"),
    ),
}
COMPOUNDS = {
    "∧": ("{s} and {t}", "{s}, but {t}"),
    "∨": ("{s} or {t}", "either {s} or {t}"),
    "⇒": ("if {s}, then {t}", "{s}, so {t}"),
}

Pair = tuple[str, str]  # statement, notation

# how many of each form go to (train, validation, test)
COUNTS = {
    "property": (390, 8, 25),
    "relation": (480, 12, 35),
    "chain": (270, 8, 25),
    "joint": (330, 8, 25),
    "compound": (630, 14, 40),
}
# The two statements that explain the notation are held out, so that the demo can ask for them; and
# nothing that is trained or validated on has one of these compositions in it as a part.
HELD_OUT = {"∃Ψ": "consciousness exists", "Ψ⇒Δ": "consciousness leads to change"}


def properties() -> Iterator[Pair]:
    """∃Ψ, ¬↑Λ: one concept has, or has not, a property."""
    for (word, symbol), (op, forms) in itertools.product(CONCEPTS.items(), PROPERTIES.items()):
        for prefix, phrasings in zip(("", "¬"), forms, strict=True):
            for phrasing in phrasings:
                yield phrasing.format(x=word), prefix + op + symbol


def relations() -> Iterator[Pair]:
    """Ψ⇒Δ, ¬(τ∈Ω): two concepts and what holds between them."""
    for (x, X), (y, Y) in itertools.permutations(CONCEPTS.items(), 2):
        for op, (one, _, denied) in RELATIONS.items():
            for verb in one:
                yield f"{x} {verb} {y}", X + op + Y
            for verb in denied:
                yield f"{x} {verb} {y}", f"¬({X}{op}{Y})"


def chains() -> Iterator[Pair]:
    """Ψ⇒Δ⇒Λ."""
    verbs = RELATIONS["⇒"][0]
    for (x, X), (y, Y), (z, Z) in itertools.permutations(CONCEPTS.items(), 3):
        for first, second in itertools.product(verbs, verbs):
            yield f"{x} {first} {y}, which {second} {z}", f"{X}⇒{Y}⇒{Z}"


def joints() -> Iterator[Pair]:
    """Ψ∧Δ⇒Λ, Ψ⇒Δ∨Λ, Ψ∧Δ∈Λ: a relation with a joint subject or object."""
    for (x, X), (y, Y), (z, Z) in itertools.permutations(CONCEPTS.items(), 3):
        for op, (one, several, _) in RELATIONS.items():
            for single, plural in zip(one, several, strict=True):
                yield f"{x} and {y} {plural} {z}", f"{X}∧{Y}{op}{Z}"
                yield f"{x} or {y} {single} {z}", f"{X}∨{Y}{op}{Z}"
                if op == "⇒":
                    yield f"{x} {single} {y} and {z}", f"{X}{op}{Y}∧{Z}"
                    yield f"{x} {single} {y} or {z}", f"{X}{op}{Y}∨{Z}"


def compounds() -> Iterator[Pair]:
    """∃Ψ∧¬↑Δ, ∃Ψ⇒↓χ: two properties of two concepts, joined."""
    for (s, S), (t, T) in itertools.permutations(list(properties()), 2):
        if S[-1] != T[-1]:
            for op, phrasings in COMPOUNDS.items():
                for phrasing in phrasings:
                    yield phrasing.format(s=s, t=t), S + op + T


FORMS = {
    "property": properties,
    "relation": relations,
    "chain": chains,
    "joint": joints,
    "compound": compounds,
}


def rank(purpose: str, text: str) -> bytes:
    """A number for `text` that looks random and is the same on every machine."""
    return hashlib.sha256(f"{SEED}/{purpose}/{text}".encode()).digest()


def held_out(notation: str) -> bool:
    """A fifth of all compositions is only tested on; which, does not depend on phrasing."""
    return notation in HELD_OUT or rank("split", notation)[0] < 52


def validates(notation: str) -> bool:
    """A tenth of the others is only validated on, carved from what was trained on before."""
    return not held_out(notation) and rank("validation", notation)[0] < 26


def build() -> dict[str, list[Pair]]:
    """The pairs of each split, in their final order."""
    splits: dict[str, list[Pair]] = {"train": [], "validation": [], "test": []}
    for form, (n_train, n_validation, n_test) in COUNTS.items():
        pairs = sorted(FORMS[form](), key=lambda pair: rank("order", pair[0]))
        free = [pair for pair in pairs if not any(part in pair[1] for part in HELD_OUT)]
        rest = [pair for pair in free if not held_out(pair[1]) and not validates(pair[1])]
        splits["train"] += rest[:n_train]
        splits["validation"] += phrased_once(p for p in free if validates(p[1]))[:n_validation]
        unseen = phrased_once(
            (statement, notation)
            for statement, notation in pairs
            if held_out(notation) and statement == HELD_OUT.get(notation, statement)
        )
        unseen.sort(key=lambda pair: pair[1] not in HELD_OUT)  # stable: the rest as they come
        splits["test"] += unseen[:n_test]
    return {name: shuffled(pairs) for name, pairs in splits.items()}


def phrased_once(pairs: Iterable[Pair]) -> list[Pair]:
    """The first phrasing of each composition."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        first.setdefault(pair[1], pair)
    return list(first.values())


def shuffled(pairs: list[Pair]) -> list[Pair]:
    """The pairs in an order that mixes the forms."""
    return sorted(pairs, key=lambda pair: rank("file", pair[0]))


def to_jsonl(pairs: list[Pair]) -> str:
    rows = ({"prompt": PROMPT.format(s), "completion": f" {n}"} for s, n in pairs)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with the files, write nothing"
    )
    check = parser.parse_args().check
    for name, pairs in build().items():
        path, text = FOLDER / f"{name}.jsonl", to_jsonl(pairs)
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.exists() or path.read_bytes() != text.encode():
            print(f"{path} is not what this tool writes; run it without --check", file=sys.stderr)
            return 1
        print(f"{path}: {len(pairs)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
