"""The model card says what a run was, and nothing that breaks its form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pylora.training import card as cards
from pylora.training.evaluate import Evaluation
from pylora.training.info import TrainResult

SOURCE = cards.Source(
    base="owner/model", base_digest="ab12", data="/home/somebody/tone|`x`.jsonl",
    data_digest="cd34", records=60, tokens=900, notes=["a note"],
    settings={"model": "/home/somebody/m.gguf", "data": "/home/somebody/d.jsonl", "lr": 0.001},
)  # fmt: skip
RESULT = TrainResult(
    losses=list(np.linspace(4, 1, 120)), steps=120, tokens=4000, seconds=12.0,
    tokens_per_second=300.0, adapter={}, best_step=80,
    evaluation=Evaluation(0.5, 1.65, 20, 0.1, {"exact_match": 0.75}),
)  # fmt: skip


def test_what_a_hub_and_a_reader_look_for() -> None:
    seen = [(step, {"eval_loss": 4 - step / 40, "eval_exact_match": None}) for step in (0, 60, 120)]
    text = cards.card(SOURCE, RESULT, seen)
    head, body = text.split("---\n")[1:3]
    assert "base_model: owner/model\n" in head and "library_name: peft\n" in head
    for word in ("60 records", "120 steps", "`ab12`", "`cd34`", "that of step 80", "a note",
                 "exact match 0.75", "| 60 | 2.5 |  |", '"lr": 0.001'):  # fmt: skip
        assert word in body, word
    assert "/home/somebody" not in text, "where the files lay is nobody's matter"
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert sum(line.count("|") for line in rows[:2]) == 6


def test_a_file_is_no_base_of_the_hub() -> None:
    text = cards.card(replace(SOURCE, base="models/x/m.gguf"), RESULT, [])
    assert "base_model:" not in text and "of m.gguf" in text and "## Curve" not in text


def test_a_long_curve_is_thinned_out_and_ends_with_its_end() -> None:
    text = cards.card(SOURCE, RESULT, [(step, {"eval_loss": 1.0}) for step in range(1000)])
    rows = [line for line in text.splitlines() if line.endswith("| 1 |")]
    assert 12 <= len(rows) <= 26 and rows[0].startswith("| 0 ") and rows[-1].startswith("| 999 ")


def test_it_is_written_beside_the_picture_and_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    text = cards.card(SOURCE, RESULT, [])
    cards.write(tmp_path, text)
    assert "loss.png" not in (tmp_path / "README.md").read_text(encoding="utf-8")
    (tmp_path / "loss.png").write_bytes(b"")
    cards.write(tmp_path, text)
    assert "![loss](loss.png)" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "adapter/README.md").read_text(encoding="utf-8") == text
