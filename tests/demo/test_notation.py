"""The shipped data set: reproducible, fairly split, and right by a grammar of its own.

`English` reads a statement word by word and `Notation` reads symbols by precedence; both give a
tree. They share nothing with the templates of tools/make_notation.py, so a wrong template shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pylora.demo import fetch

FOLDER = Path(fetch.__file__).parent / "data" / "notation"
TOOL = Path(__file__).parents[2] / "tools" / "make_notation.py"
ENDING = " →"

Tree = str | tuple  # a concept, or (operator, operand, ...)
Pair = tuple[str, str]

CONCEPTS = dict(
    zip(
        "consciousness truth life reality change time memory energy chaos knowledge thought "
        "emptiness".split(),
        "ΨΦΛΩΔτμεχΣθ∅",
        strict=True,
    )
)
PROPERTY_VERBS = {"exist": "∃", "grow": "↑", "increase": "↑", "fade": "↓", "decrease": "↓"}
PROPERTY_WORDS = {"real": "∃", "rising": "↑", "waning": "↓", "eternal": "∞"}
RELATION_VERBS = {
    ("lead", "to"): "⇒",
    ("imply",): "⇒",
    ("give", "rise", "to"): "⇒",
    ("equal",): "≡",
    ("belong", "to"): "∈",
}
RELATION_WORDS = {("the", "same", "as"): "≡", ("part", "of"): "∈"}


def load(name: str) -> list[Pair]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    assert all(row["prompt"].endswith(ENDING) for row in rows)
    assert all(row["completion"].startswith(" ") for row in rows)
    return [(row["prompt"].removesuffix(ENDING), row["completion"][1:]) for row in rows]


TRAIN, VALIDATION, TEST = load("train"), load("validation"), load("test")


def lemma(verb: str) -> str:
    return {"implies": "imply"}.get(verb, verb.removesuffix("s"))


class English:
    """Recursive descent over words. `skeletons` collects each clause with its nouns left out."""

    def __init__(self, statement: str) -> None:
        self.words = statement.replace(",", " ,").split()
        self.skeletons: set[str] = set()

    def peek(self, *words: str) -> bool:
        return tuple(self.words[: len(words)]) == words

    def take(self, *words: str) -> bool:
        if self.peek(*words):
            del self.words[: len(words)]
            return True
        return False

    def must(self, *words: str) -> None:
        assert self.take(*words), f"expected {words} at {self.words}"

    def sentence(self) -> Tree:
        if self.take("if"):
            first = self.clause()
            self.must(",", "then")
            tree: Tree = ("⇒", first, self.clause())
        elif self.take("either"):
            first = self.clause()
            self.must("or")
            tree = ("∨", first, self.clause())
        else:
            tree = self.clause()
            for words, op in (
                ((",", "so"), "⇒"),
                ((",", "but"), "∧"),
                (("and",), "∧"),
                (("or",), "∨"),
            ):
                if self.take(*words):
                    tree = (op, tree, self.clause())
                    break
        assert not self.words, f"left over: {self.words}"
        return tree

    def clause(self) -> Tree:
        before = list(self.words)
        tree = self.bare_clause()
        used = before[: len(before) - len(self.words)]
        self.skeletons.add(" ".join("_" if word in CONCEPTS else word for word in used))
        return tree

    def bare_clause(self) -> Tree:
        if self.take("there", "is"):
            denied = self.take("no")
            return self.deny(denied, ("∃", self.noun()))
        denied = self.take("not")
        if self.take("everything", "is") or self.take("all", "is"):
            return self.deny(denied, ("∀", self.noun()))
        assert not denied
        return self.predicate(self.nouns())

    def predicate(self, subject: Tree) -> Tree:
        """What is said of the subject; ", which ..." says more of the object."""
        if self.take("is") or self.take("are"):
            denied, words = self.take("not"), RELATION_WORDS
            if self.words[0] in PROPERTY_WORDS:
                return self.deny(denied, (PROPERTY_WORDS[self.words.pop(0)], subject))
        else:
            denied, words = self.take("does", "not"), RELATION_VERBS
            self.words[0] = lemma(self.words[0])
            if self.take("last", "forever"):
                return self.deny(denied, ("∞", subject))
            if self.words[0] in PROPERTY_VERBS:
                return self.deny(denied, (PROPERTY_VERBS[self.words.pop(0)], subject))
        op = next(op for phrase, op in words.items() if self.take(*phrase))
        target = self.nouns()
        if self.take(",", "which"):
            target = self.predicate(target)
        return self.deny(denied, (op, subject, target))

    def nouns(self) -> Tree:
        noun = self.noun()
        for word, op in (("and", "∧"), ("or", "∨")):
            if self.take(word):
                return (op, noun, self.noun())
        return noun

    def noun(self) -> Tree:
        return CONCEPTS[self.words.pop(0)]

    @staticmethod
    def deny(denied: bool, tree: Tree) -> Tree:
        return ("¬", tree) if denied else tree


class Notation:
    """Precedence climbing over symbols: ⇒ ≡ ∈ (to the right), then ∧ ∨, then prefixes."""

    def __init__(self, text: str) -> None:
        self.rest = text

    def take(self, symbols: str) -> str:
        if self.rest and self.rest[0] in symbols:
            taken, self.rest = self.rest[0], self.rest[1:]
            return taken
        return ""

    def whole(self) -> Tree:
        tree = self.relation()
        assert not self.rest, f"left over: {self.rest!r}"
        return tree

    def relation(self) -> Tree:
        left = self.joint()
        op = self.take("⇒≡∈")
        return (op, left, self.relation()) if op else left

    def joint(self) -> Tree:
        left = self.prefixed()
        op = self.take("∧∨")
        return (op, left, self.prefixed()) if op else left

    def prefixed(self) -> Tree:
        if op := self.take("¬∃↑↓∞∀"):
            return (op, self.prefixed())
        if self.take("("):
            inner = self.relation()
            assert self.take(")")
            return inner
        symbol = self.take("".join(CONCEPTS.values()))
        assert symbol, f"expected a concept at {self.rest!r}"
        return symbol


def test_every_completion_means_what_its_statement_says() -> None:
    for statement, notation in TRAIN + VALIDATION + TEST:
        assert English(statement).sentence() == Notation(notation).whole(), statement


@pytest.mark.parametrize(
    ("statement", "notation"),
    [
        ("consciousness exists", "∃Ψ"),
        ("consciousness leads to change", "Ψ⇒Δ"),
        ("if there is no truth, then chaos grows", "¬∃Φ⇒↑χ"),
        ("life or time does not belong to reality", "¬(Λ∨τ∈Ω)"),
    ],
)
def test_the_two_readers_themselves(statement: str, notation: str) -> None:
    assert English(statement).sentence() == Notation(notation).whole()
    assert English(statement).sentence() != Notation("∃Φ").whole()


def test_sizes_and_no_repetition() -> None:
    assert 1500 <= len(TRAIN) <= 2500
    assert len(TEST) == 150
    assert len(VALIDATION) == 50
    statements = [statement for statement, _ in TRAIN + VALIDATION + TEST]
    assert len(set(statements)) == len(statements)
    assert len({notation for _, notation in TEST}) == len(TEST)
    assert len({notation for _, notation in VALIDATION}) == len(VALIDATION)


def test_held_out_compositions_are_never_trained_on_in_any_phrasing() -> None:
    trained, validated, held_out = (
        {str(Notation(notation).whole()) for _, notation in pairs}
        for pairs in (TRAIN, VALIDATION, TEST)
    )
    assert not trained & held_out
    assert not trained & validated
    assert not validated & held_out
    assert ("consciousness exists", "∃Ψ") in TEST
    assert ("consciousness leads to change", "Ψ⇒Δ") in TEST


def test_what_the_project_began_with_is_no_part_of_anything_trained_on() -> None:
    for statement, notation in TRAIN + VALIDATION:
        assert "consciousness exists" not in statement
        assert "consciousness leads to change" not in statement
        assert "∃Ψ" not in notation and "Ψ⇒Δ" not in notation


def test_every_word_symbol_and_phrasing_of_the_other_splits_is_trained_on() -> None:
    def atoms(pairs: list[Pair]) -> tuple[set[str], set[str], set[str]]:
        words, symbols, skeletons = set(), set(), set()
        for statement, notation in pairs:
            reader = English(statement)
            words |= set(reader.words)
            symbols |= set(notation)
            reader.sentence()
            skeletons |= reader.skeletons
        return words, symbols, skeletons

    for tested, trained in zip(atoms(TEST + VALIDATION), atoms(TRAIN), strict=True):
        assert tested <= trained, tested - trained
    assert set(CONCEPTS.values()) <= atoms(TRAIN)[1]


def test_the_files_are_what_the_tool_writes_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
