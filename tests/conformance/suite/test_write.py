"""The suite itself: the same bytes from the same seed, files that others read, answers apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from suites import book

from pylora.conformance.suite import answers, bases, sequences, tokenizer
from pylora.conformance.suite.bases import Base, make
from pylora.conformance.suite.tolerance import PRECISIONS, Sensitivity
from pylora.conformance.suite.write import write_suite
from pylora.errors import ConfigError
from pylora.formats import open_checkpoint


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    again = write_suite(tmp_path / "again", ["llama"], 0, lambda text: None)
    assert again["files"] == book().manifest["files"]
    there = {p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again").rglob("*")
             if p.is_file()}  # fmt: skip
    assert there == {*again["files"], "manifest.json"}
    assert json.loads((tmp_path / "again" / "manifest.json").read_text()) == book().manifest


def test_another_seed_gives_other_weights() -> None:
    one, two = make("llama", False, 0), make("llama", False, 1)
    assert all(not np.array_equal(w, two.weights[n]) for n, w in one.weights.items())


@pytest.mark.parametrize("family", bases.families())
@pytest.mark.parametrize("tied", [False, True])
def test_every_family_has_a_base_that_both_formats_hold_exactly(
    family: str, tied: bool, tmp_path: Path
) -> None:
    base = make(family, tied, 3)
    bases.write_hf(base, tmp_path / "hf")
    places = [tmp_path / "hf"]
    if base.gguf_arch is not None:
        bases.write_gguf_model(base, tmp_path / "base.gguf")
        places.append(tmp_path / "base.gguf")
    for place in places:
        with open_checkpoint(place) as checkpoint:
            assert set(checkpoint.names()) == set(base.weights)
            for name, w in base.weights.items():
                assert np.array_equal(checkpoint.load(name), w), (place, name)
            for text, ids in zip(answers.TEXTS, answers.PROMPTS):
                assert checkpoint.tokenizer().encode(text) == list(ids)
    assert all(np.array_equal(w.astype(np.float16), w) for w in base.weights.values())


def _apart(one: Any, other: Any) -> tuple[float, float]:
    """How far answers are apart: over a prompt's tokens, over the likeliest next of the second."""
    said = max(np.abs(np.subtract(a, b)).max() for a, b in zip(one["prompt"], other["prompt"]))
    then = 0.0
    for a, b in zip(one["next"], other["next"]):
        likely = np.argsort(b)[-5:]
        then = max(then, np.abs(np.subtract(a, b))[likely].max())
    return float(said), float(then)


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_right_and_every_wrong_rule_are_well_apart(base: str) -> None:
    """What is more than two tolerances apart can be told from each other."""
    (entry,) = book().bases([base])
    for case in entry["cases"]:
        listed = book().answers(case)
        every = {"right": listed["right"], **listed["wrong"]}
        assert set(every) == {"right", *case["wrong"]} and "ignored" in every
        limit = Sensitivity(*case["sensitivity"])
        for name, one in every.items():
            for rule, other in every.items():
                if name == rule:
                    continue
                said, then = _apart(one, other)
                where = case["name"], name, rule, said, then
                # An engine in bfloat16 that shows the prompt's tokens is told to be wrong; one in
                # float16 that shows next tokens alone is told by which rule.
                if name == "right":
                    assert max(said, then) > 2 * limit.tolerance("bf16"), where
                assert then > 2 * limit.tolerance("fp16"), where


def test_the_tolerance_is_that_of_the_precision() -> None:
    s = Sensitivity(100.0, 300.0)
    least = [s.tolerance(p) for p in ("fp32", "fp16", "bf16", "fp8")]
    assert least == sorted(least)
    assert s.tolerance("bf16") == pytest.approx(2.5 * 100 / 256 + 2e-4)
    assert s.tolerance("q8_0") == pytest.approx(2.5 * (100 / 2048 + 300 * 0.5 / 127) + 2e-4)
    with pytest.raises(ConfigError, match="no precision 'fp31'"):
        s.tolerance("fp31")
    assert set(PRECISIONS) == set(book().manifest["precisions"])


def test_a_foreign_prefix_of_one_own_adapter_is_no_change() -> None:
    from pylora.conformance.suite import adapters, cases

    base: Base = make("llama", False, 0)
    alpha = adapters.draw(cases.CASES[0], base, 0).meaning()
    right = answers.answer(base, alpha).next[3]
    for kept in sequences.kept_lengths(len(answers.PROMPTS[3])):
        got = sequences.foreign_prefix(base, alpha, alpha, 3, kept).next[0]
        assert np.abs(got - right).max() < 1e-9


def test_the_prompts_share_two_blocks_and_their_tokens_have_names() -> None:
    shared = 0
    while answers.PROMPTS[2][shared] == answers.PROMPTS[3][shared]:
        shared += 1
    assert shared >= 2 * sequences.BLOCK
    names = tokenizer.texts()
    assert all(names.count(names[t]) == 1 for p in answers.PROMPTS for t in p)


@pytest.mark.parametrize(
    ("families", "seed", "said"),
    [(["lama"], 0, "no family 'lama'"), (["llama"], -1, "--seed -1"), (["llama"], 2**64, "--seed")],
)
def test_what_cannot_be_written_is_refused(
    families: list[str], seed: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        write_suite(tmp_path / "out", families, seed, print)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="a folder with other files"):
        write_suite(tmp_path, ["llama"], 0, print)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]
