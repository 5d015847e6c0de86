"""tools/build_core.py: each file of the core is compiled once, again only if what it includes has
changed, and several at a time. The compiler is a class that writes down what it was asked for."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parents[2]


class Compiler:
    """As much of setuptools' as is used."""

    compiler_so = ("true", "a compiler without a version")

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.at_once = self.most = 0
        self.lock = threading.Lock()

    def compile(self, sources: list[str], output_dir: str, **rest: Any) -> list[str]:
        with self.lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(0.05)
        (source,) = sources
        made = Path(output_dir) / f"{Path(source).stem}.o"
        made.parent.mkdir(parents=True)
        made.write_text(Path(source).read_text())
        with self.lock:
            self.at_once -= 1
            self.compiled.append(Path(source).stem)
        return [str(made)]

    def create_static_lib(self, objects: list[str], name: str, output_dir: str) -> None:
        text = "".join(Path(o).read_text() for o in objects)
        (Path(output_dir) / f"lib{name}.a").write_text(text)

    def took(self) -> list[str]:
        done, self.compiled = self.compiled, []
        return sorted(done)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_core", ROOT / "tools" / "build_core.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    csrc = tmp_path / "csrc"
    for folder in ("cpu", "ops"):
        (csrc / folder).mkdir(parents=True)
    (csrc / "sources.txt").write_text("cpu/kernels.c\nops/a.c\nops/b.c\n")
    (csrc / "cpu" / "rows.inc").write_text("/* rows */\n")
    (csrc / "cpu" / "kernels.c").write_text('#include "rows.inc"\nint kernels;\n')
    (csrc / "ops" / "deep.h").write_text("/* deep */\n")
    (csrc / "ops" / "a.h").write_text('#include "ops/deep.h"\n')
    (csrc / "ops" / "a.c").write_text('#include <math.h>\n#include "a.h"\nint a;\n')
    (csrc / "ops" / "b.c").write_text("int b;\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYLORA_BUILD_JOBS", raising=False)
    return module


def test_only_what_changed_is_compiled(
    build: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    compiler, objects = Compiler(), tmp_path / "objects"
    library = objects / "libpylora.a"
    assert build.compile_core(compiler, objects) == [str(library)]
    assert compiler.took() == ["a", "b", "kernels"]
    assert all(f"int {name};" in library.read_text() for name in ("a", "b", "kernels"))
    assert "3 of 3 files" in capfd.readouterr().err.splitlines()[-1]
    build.compile_core(compiler, objects)
    assert compiler.took() == []
    (tmp_path / "csrc" / "ops" / "deep.h").write_text("/* changed */\n")
    build.compile_core(compiler, objects)
    assert compiler.took() == ["a"]
    (tmp_path / "csrc" / "cpu" / "rows.inc").write_text("/* changed */\n")
    build.compile_core(compiler, objects)
    assert compiler.took() == ["kernels"]
    compiler.compiler_so = ("true", "another")
    build.compile_core(compiler, objects)
    assert compiler.took() == ["a", "b", "kernels"]
    assert len(list(objects.glob("*.o"))) == 3  # what is out of date is not kept


@pytest.mark.parametrize(("version", "more"), [("gcc 12", True), ("Apple clang 15", False)])
def test_gccs_own_flags_are_for_gcc(build: ModuleType, version: str, more: bool) -> None:
    assert (build.flags_for(["echo", version]) == build.FLAGS + build.GCC_FLAGS) == more
    assert build.flags_for(None) == build.FLAGS


def test_as_many_at_a_time_as_asked(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYLORA_BUILD_JOBS", "3")
    several = Compiler()
    build.compile_core(several, tmp_path / "several")
    assert several.most > 1
    monkeypatch.setenv("PYLORA_BUILD_JOBS", "1")
    one = Compiler()
    build.compile_core(one, tmp_path / "one")
    assert one.most == 1
    assert one.compiled[0] == "kernels"  # what takes longest comes first
    for wrong in ("0", "-1", "two"):
        monkeypatch.setenv("PYLORA_BUILD_JOBS", wrong)
        with pytest.raises(SystemExit, match="whole number from 1 on"):
            build.workers()


def test_a_file_that_does_not_compile_leaves_nothing_to_be_taken_for_it(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Compiler):
        def compile(self, sources: list[str], output_dir: str, **rest: Any) -> list[str]:
            if sources[0].endswith("b.c"):
                raise RuntimeError("b.c does not compile")
            return super().compile(sources, output_dir, **rest)

    with pytest.raises(RuntimeError, match=r"b\.c does not compile"):
        build.compile_core(Broken(), tmp_path / "objects")
    good = Compiler()
    build.compile_core(good, tmp_path / "objects")
    assert "b" in good.took()


def test_the_lists_name_every_source_once() -> None:
    csrc = ROOT / "csrc"
    listed = [n for f in csrc.glob("sources*.txt") for n in f.read_text().split()]
    there = {f.relative_to(csrc).as_posix() for f in csrc.rglob("*.c")} - {"reference.c"}
    assert sorted(listed) == sorted(there)
