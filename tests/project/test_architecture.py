"""docs/architecture.md is of this code, and tests are found by the path of what they test."""

from __future__ import annotations

import ast
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pylora"
DOC = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WINGS = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
MODULES = {p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")}

# Folders of tests that are no wing: what they are about is not one folder of pylora/.
OTHERS = {"c", "clib", "cuda", "cupy_standin", "fuzz", "parity", "project", "support"}
# Tests of several modules at once, by what they have in common.
TOGETHER = {
    "backends/test_gpu.py",  # whole models on a GPU
    "commands/test_gpu_cli.py",  # every verb on a GPU
    "commands/test_options.py",  # every option of every verb
    "commands/test_process.py",  # the command as a process: signals, terminals
    "conformance/test_example_adapters.py",  # examples/conformance
    "conformance/test_ports.py",  # examples/ports
    "demo/test_notation.py",  # the data set
    "formats/test_bad_files.py",  # damaged files of every format
    "formats/test_files_doc.py",  # the tables of docs/files.md
    "front/test_public.py",  # the names of pylora itself
    "merging/test_beside.py",  # what lies beside the weights
    "model/test_dora_batches.py",  # adapters of several kinds in one batch
    "model/test_concurrency.py",  # threads and forks
    "model/test_layers.py",  # the layers against formulas
    "model/test_tiny_transformers.py",  # every shape that the kit draws
    "reference/test_gradients.py",  # the reference is one module
    "reference/test_lora_laws.py",
    "text/test_hostile_tokenizers.py",  # files with anything in them
    "text/test_special_tokens.py",  # from every file that has some
    "training/test_train_whole.py",  # runs that train whole weights
    "web/test_load.py",  # many at once
    "web/test_malformed.py",  # whatever anybody sends
    "text/test_text_docs.py",  # the lists in docs/text.md
}


@pytest.fixture(scope="module")
def tool() -> Any:
    return runpy.run_path(str(ROOT / "tools" / "draw_architecture.py"))


def test_the_picture_is_of_todays_imports(tool: Any) -> None:
    assert tool["stale"]() is None, "run python tools/draw_architecture.py and look at the picture"


def test_another_import_would_be_noticed(tool: Any, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "pylora", ignore=shutil.ignore_patterns("*.so", "data"))
    assert tool["stale"](tmp_path) is None
    file = tmp_path / "pylora" / "text" / "chat.py"
    file.write_text(file.read_text() + "\ndef f():\n    from pylora.model import config\n")
    assert "now text imports model" in tool["stale"](tmp_path)


def test_a_circle_is_named(tool: Any) -> None:
    with pytest.raises(SystemExit, match="circle: a -> b -> a"):
        tool["floors"](["a", "b"], {"a": {"b"}, "b": {"a"}})


def test_an_arrow_that_others_imply_is_left_out(tool: Any) -> None:
    below = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert tool["reduced"](below) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert tool["floors"](list(below), below) == {"d": 0, "c": 1, "b": 2, "a": 3}


def place(path: str) -> Path:
    """A path of the page: below pylora/ unless it begins elsewhere."""
    return next((r / path for r in (PACKAGE, ROOT) if (r / path).exists()), ROOT / path)


def test_every_path_of_the_page_exists() -> None:
    paths = set(re.findall(r"`([\w.]+(?:/[\w.]*)+)`", DOC))
    assert len(paths) > 50
    assert not [p for p in paths if not place(p).exists()]


def test_every_wing_is_in_the_picture(tool: Any) -> None:
    assert set(tool["wings"](PACKAGE)) == WINGS | MODULES
    assert set(tool["WORDS"]) == {n for group in tool["KINDS"].values() for n in group}
    assert set(tool["WORDS"]) == WINGS | MODULES


QUESTIONS = re.findall(r"^\| ([^|]+) \| ([\w/]+) \| `([^`]+)` \| `([^`]+)` \|$", DOC, re.M)


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10


@pytest.mark.parametrize(("question", "wing", "path", "name"), QUESTIONS)
def test_what_a_stranger_asks_is_where_the_folder_says(
    question: str, wing: str, path: str, name: str
) -> None:
    assert path.startswith(f"{wing}/")
    text = place(path).read_text(encoding="utf-8")
    if not path.endswith(".py"):
        assert re.search(rf"^[\w *]+\b{name}\([^;]*\{{$", text, re.M)
        return
    defined = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    assert name in defined


# ---- tests ------------------------------------------------------------------------------------


def has_code(wing: str) -> bool:
    """More than a docstring."""
    files = [p for p in (PACKAGE / wing).rglob("*.py") if p.name != "__init__.py"]
    return bool(files)


def test_each_wing_has_its_tests_and_each_folder_of_tests_its_wing() -> None:
    tests = ROOT / "tests"
    folders = {p.name for p in tests.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders - OTHERS <= WINGS | MODULES
    assert {w for w in WINGS if has_code(w)} <= folders
    for folder in folders - OTHERS:
        assert list((tests / folder).rglob("test_*.py")), f"tests/{folder} has no tests"


def test_a_test_is_named_by_what_it_tests() -> None:
    """tests/<wing>/test_<module>.py, or by a wing or a folder of one as a whole."""
    wrong = []
    for file in (ROOT / "tests").rglob("test_*.py"):
        inside = file.relative_to(ROOT / "tests")
        if inside.parts[0] in OTHERS or inside.as_posix() in TOGETHER:
            continue
        name, folder = file.stem.removeprefix("test_"), PACKAGE.joinpath(*inside.parts[:-1])
        subject = folder / f"{name}.py"
        if not (subject.exists() or (folder / name).is_dir() or name == folder.name):
            wrong.append(inside.as_posix())
    assert not wrong, f"{wrong}: which module is that? (tests of several are listed here)"
    assert not [t for t in TOGETHER if not (ROOT / "tests" / t).exists()]
