"""tools/nightly.py: goes on where it was cut off, and says what was run and what was not."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

TOOL = Path(__file__).parents[2] / "tools" / "nightly.py"
CORRECT = "pylora.conformance.correct.plain:Correct"


@pytest.fixture
def nightly(monkeypatch, tmp_path):
    """Runs the tool with these arguments; gives its exit code and the file's records."""
    spec = importlib.util.spec_from_file_location("nightly", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PROBE", 3)
    out = tmp_path / "results.jsonl"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nightly", "--out", str(out), *arguments])
        code = module.main()
        return code, module.records(out)

    run.module, run.out = module, out
    return run


def test_it_goes_on_where_it_was(nightly, capsys):
    code, first = nightly(CORRECT, "--law", "F1", "--examples", "12")
    assert code == 0 and [(r["law"], r["asked"]) for r in first] == [("F1", 3), ("F1", 12)]
    with nightly.out.open("a") as file:
        file.write('{"implementation": "cut o')  # as a killed process leaves it
    _, second = nightly(CORRECT, "--law", "F1", "--law", "B1", "--examples", "12")
    assert [(r["law"], r["asked"]) for r in second[2:]] == [("B1", 3), ("B1", 12)]
    assert "F1 B1" not in capsys.readouterr().out.splitlines()[-1]


def test_what_does_not_end_in_time_is_not_begun_and_not_passed(nightly, capsys):
    code, found = nightly(CORRECT, "--law", "F1", "--examples", "12", "--minutes", "0")
    assert code == 0 and [r["asked"] for r in found] == [3]
    said = capsys.readouterr().out
    assert "F1: not begun" in said
    cells = [c.strip() for c in said.splitlines()[-1].split("|")]
    assert cells[2] == "0" and "F1" in cells[5].split()


def test_a_failure_is_a_result(nightly, monkeypatch, tmp_path, capsys):
    (tmp_path / "wrong.py").write_text(
        "class Wrong:\n"
        "    def forward(self, x, W, A, B, scale, bias=None):\n"
        "        return x @ W.T\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, found = nightly("wrong:Wrong", "--law", "F2", "--examples", "40")
    assert code == 1 and found[-1]["status"] == "FAILED" and found[-1]["counterexample"]
    assert "F2 FAILED" in capsys.readouterr().out.splitlines()[-1]


def test_results_of_other_code_do_not_count(nightly, monkeypatch):
    nightly(CORRECT, "--law", "F1", "--examples", "4")
    monkeypatch.setattr(nightly.module, "code", lambda: "another")
    _, found = nightly(CORRECT, "--law", "F1", "--examples", "4")
    assert [r["asked"] for r in found] == [3, 4, 3, 4]
    assert {r["code"] for r in found} > {"another"}
    assert all(json.dumps(r) for r in found)
