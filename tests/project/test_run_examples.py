"""Every program in examples/ runs as a user would run it, and its own assertions hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from core import core_lib

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAMS = sorted(p.name for p in EXAMPLES.glob("[0-9]*.py"))


def run(command: list[str], where: Path) -> str:
    result = subprocess.run(
        command, cwd=where, capture_output=True, text=True, encoding="utf-8", timeout=600
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_example(name: str, tmp_path: Path) -> None:
    assert run([sys.executable, str(EXAMPLES / name)], tmp_path).strip(), "it printed nothing"


def test_examples_are_numbered_without_gaps() -> None:
    assert [int(name[:2]) for name in PROGRAMS] == list(range(1, len(PROGRAMS) + 1))


def test_c_example(tmp_path: Path) -> None:
    make, cc = shutil.which("make"), shutil.which(os.environ.get("CC", "cc"))
    if not make or not cc:
        pytest.skip("needs make and a C compiler")
    where = [f"BUILD={tmp_path}", f"CC={cc}", core_lib(make, cc)]
    output = run([make, "-C", str(EXAMPLES / "c"), *where], tmp_path)
    assert "unmerged: bit for bit the base" in output
