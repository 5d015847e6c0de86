"""tools/requirements.py and tools/told.py, which the Makefile is made of."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_extras_of_extras_are_followed_and_each_is_named_once() -> None:
    document = {
        "build-system": {"requires": ["setuptools>=1"]},
        "project": {
            "name": "it",
            "dependencies": ["a>=1"],
            "optional-dependencies": {
                "x": ["b[c]>=2"],
                "y": ["it[x,z]", "d"],
                "z": ["d", "other[x]"],
            },
        },
    }
    found = load("requirements").requirements
    assert found(document, ["build"]) == ["setuptools>=1"]
    assert found(document, ["base", "y", "z"]) == ["a>=1", "b[c]>=2", "d", "other[x]"]
    with pytest.raises(SystemExit, match="no extra 'w'; it has base, build, x, y, z"):
        found(document, ["w"])


def test_the_projects_own_requirements() -> None:
    command = [sys.executable, str(TOOLS / "requirements.py"), "base", "test"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = {re.split(r"[^\w-]", line)[0] for line in lines if line}
    assert {"numpy", "cffi", "typer", "matplotlib", "hypothesis", "pytest"} <= names
    assert not any(name.startswith("pylora") for name in names)


def told(*command: str) -> subprocess.CompletedProcess[str]:
    program = f"import runpy, sys; m = runpy.run_path({str(TOOLS / 'told.py')!r}); "
    program += "m['main'].__globals__['EVERY'] = 0.2; sys.exit(m['main']('Thinking', sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True)


def test_what_takes_long_is_told_and_its_output_is_not() -> None:
    program = "import sys, time; print('noise'); print('seen', file=sys.stderr); time.sleep(1)"
    done = told(sys.executable, "-c", program)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0] == "Thinking ..."
    assert len([line for line in lines if line.endswith("s so far")]) >= 2
    assert re.fullmatch(r"Thinking: done in \d+ s", lines[-1])
    assert "noise" not in done.stdout and done.stderr == "seen\n"


def test_a_failure_shows_the_output_and_has_its_exit_status() -> None:
    done = told(sys.executable, "-c", "print('why'); raise SystemExit(7)")
    assert done.returncode == 7 and "why\n" in done.stdout
    assert "failed (exit status 7)" in done.stdout
    done = told("no-such-command-here")
    assert done.returncode == 127 and "no-such-command-here cannot be run" in done.stderr
