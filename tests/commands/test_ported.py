"""`pylora vectors --check`: what it prints, what it writes, its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pylora.commands import cli
from pylora.conformance.vectors.cases import Case


@pytest.fixture(autouse=True)
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("one", "op", ("F-1",))
    case.expect("y", np.array([1.0, 2.0]), 0.1, "a rule")
    monkeypatch.setattr("pylora.conformance.vectors.all.all_cases", lambda: [case])
    monkeypatch.setattr("pylora.conformance.vectors.all.all_questions", dict)


def port(where: Path, *numbers: float) -> list[str]:
    (where / "one").mkdir(exist_ok=True)
    (where / "one" / "y.bin").write_bytes(np.array(numbers, np.float32).tobytes())
    return ["vectors", "--check", str(where)]


def test_a_port_that_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    reports = [tmp_path / name for name in ("r.json", "b.json", "t.md")]
    options = zip(("--json", "--badge", "--markdown"), map(str, reports))
    assert cli.main([*port(out, 1, 2), *(word for pair in options for word in pair)]) == 0
    assert f"{out}: all 1 statements passed" in capsys.readouterr().out
    report, badge = (json.loads(file.read_text()) for file in reports[:2])
    assert report["statements"]["F-1"] == {
        "state": "passed", "passed": 1, "failed": 0, "not attempted": 0,
    }  # fmt: skip
    assert set(badge) == {"schemaVersion", "label", "message", "color"}
    assert "| F-1 | passed | 1 | 0 | 0 |" in reports[2].read_text()


def test_a_port_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "else.txt").write_text("")
    assert cli.main(port(tmp_path, 1, 3)) == 1
    said = capsys.readouterr().out
    assert "one/y (F-1): 1 of 2 numbers are wrong, the first at [1]" in said
    assert "else.txt: belongs to no case of these vectors, and was not looked at" in said
    assert "1 of 1 statements failed" in said


def test_a_port_that_did_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vectors", "--check", str(tmp_path)]) == 1
    assert "0 of 1 statements passed" in capsys.readouterr().out


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["vectors", "--check", str(tmp_path / "none")]) == 1
    assert "there is no such folder" in capsys.readouterr().err
