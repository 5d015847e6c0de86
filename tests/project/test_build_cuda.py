"""Building the CUDA library: where nvcc is looked for, what its absence or failure means, and that
only what changed is compiled again. Here nvcc is a script; CI's stage `cuda` runs the real one."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library is for Linux")

WORKS = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.9, V13.9.1"; exit 0; }
echo "$*" >> "$(dirname "$0")/log"
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""
FAILS = """#!/bin/sh
[ "$1" = --version ] && { echo "release 13.9"; exit 0; }
echo "fatal: this GPU toolkit is broken" >&2
exit 2
"""


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, on a machine with a driver and no toolkit, and with a few sources."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "tools" / "build_cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("PYLORA_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(module, "TOOLKIT", tmp_path / "toolkit")
    driver = tmp_path / "driver"
    driver.write_text("NVRM version: 1")
    monkeypatch.setattr(module, "DRIVER", driver)
    sources = tmp_path / "csrc" / "cuda"
    sources.mkdir(parents=True)
    (sources / "device.cuh").write_text("#ifndef D\n#define D\nint device;\n#endif\n")
    (sources / "a.cuh").write_text('#include "device.cuh"\nint a;\n')
    (sources / "b.cuh").write_text('#include "device.cuh"\nint b;\n')
    (sources / "a.cu").write_text('#include <math.h>\n#include "a.cuh"\n')
    (sources / "b.cu").write_text('#include "b.cuh"\n')
    (sources / "kernels.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n')
    monkeypatch.setattr(module, "SOURCES", sources)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def nvcc(folder: Path, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "nvcc"
    tool.write_text(script)
    tool.chmod(0o755)
    return tool


def note(package: Path) -> str:
    return (package / "_cuda_note.txt").read_text()


def test_nvcc_is_looked_for_in_order(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if Path("/usr/bin/nvcc").exists():
        pytest.skip("this machine has an nvcc of its distribution")
    assert build.find_nvcc() is None
    usual = nvcc(build.TOOLKIT / "bin", WORKS)
    assert build.find_nvcc() == str(usual)
    home = nvcc(tmp_path / "home" / "bin", WORKS)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(home)
    first = nvcc(tmp_path / "path", WORKS)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}/usr/bin:/bin")
    assert build.find_nvcc() == str(first)


def test_off_does_not_look(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    nvcc(build.TOOLKIT / "bin", FAILS)
    monkeypatch.setenv("PYLORA_CUDA", "off")
    made = build.build(tmp_path / "package", tmp_path / "objects")
    assert {f.name for f in made} == {"_cuda_kernels.cu.gz", "_cuda_note.txt"}
    assert "off" in note(tmp_path / "package")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("script", [None, FAILS])
def test_without_a_working_nvcc(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    script: str | None,
) -> None:
    if script:
        nvcc(build.TOOLKIT / "bin", script)
    reason = "toolkit is broken" if script else "no nvcc was found"
    package = tmp_path / "package"
    package.mkdir()
    (package / "libpylora_cuda.so").write_text("of an earlier build")
    made = build.build(package, tmp_path / "objects")
    assert {f.name for f in made} == {"_cuda_kernels.cu.gz", "_cuda_note.txt"}
    assert not (package / "libpylora_cuda.so").exists()
    assert reason in note(package)
    assert reason in capfd.readouterr().err
    monkeypatch.setenv("PYLORA_CUDA", "on")
    with pytest.raises(SystemExit, match="PYLORA_CUDA=on") as error:
        build.build(package, tmp_path / "objects")
    assert reason in str(error.value)


@pytest.mark.parametrize("listing", [None, "exit 9", "echo No devices were found", "echo GPU 0: X"])
def test_without_a_driver_nothing_is_compiled_unless_asked(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    listing: str | None,
) -> None:
    """nvcc alone is no reason. Where /proc does not tell, nvidia-smi does."""
    tool = nvcc(build.TOOLKIT / "bin", WORKS)
    build.DRIVER.unlink()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin")
    monkeypatch.setattr(build, "find_nvcc", lambda: str(tool))
    if listing:
        smi = tmp_path / "bin" / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{listing}\n")
        smi.chmod(0o755)
    elif shutil.which("nvidia-smi"):
        pytest.skip("this machine has an nvidia-smi of its distribution")
    package = tmp_path / "package"
    made = build.build(package, tmp_path / "objects")
    if listing == "echo GPU 0: X":
        assert package / "libpylora_cuda.so" in made
        return
    assert {f.name for f in made} == {"_cuda_kernels.cu.gz", "_cuda_note.txt"}
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "no NVIDIA driver" in said and "PYLORA_CUDA=on" in said
    monkeypatch.setenv("PYLORA_CUDA", "on")
    assert package / "libpylora_cuda.so" in build.build(package, tmp_path / "objects")


def test_other_gpus_can_be_named(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [t.split("=", 2)[2] for t in build.targets()] == [
        "compute_80,code=sm_80",
        "compute_90,code=[sm_90,compute_90]",
    ]
    monkeypatch.setenv("PYLORA_CUDA_TARGETS", "90a")
    assert build.targets() == ["-gencode=arch=compute_90a,code=[sm_90a,compute_90a]"]
    monkeypatch.setenv("PYLORA_CUDA_TARGETS", "H100")
    with pytest.raises(SystemExit, match="80,90"):
        build.targets()


def test_an_unknown_wish_is_an_error(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLORA_CUDA", "maybe")
    with pytest.raises(SystemExit, match="auto, on or off"):
        build.wanted()


def test_only_what_changed_is_compiled(build: ModuleType, tmp_path: Path) -> None:
    tool = nvcc(build.TOOLKIT / "bin", WORKS)
    log = tool.parent / "log"

    def compiled() -> list[str]:
        log.write_text("")
        made = build.build(tmp_path / "package", tmp_path / "objects")
        assert (tmp_path / "package" / "libpylora_cuda.so") in made
        lines = log.read_text().splitlines()
        assert sum("-shared" in line for line in lines) == 1
        return sorted(m[1] for line in lines if (m := re.search(r"-c \S*/(\w+)\.cu ", line)))

    assert compiled() == ["a", "b"]  # kernels.cu is for the run-time compiler
    assert note(tmp_path / "package") == "built by nvcc 13.9 for sm_80, sm_90 and PTX\n"
    assert compiled() == []
    (build.SOURCES / "b.cuh").write_text("int changed;\n")
    assert compiled() == ["b"]
    (build.SOURCES / "device.cuh").write_text("int changed;\n")
    assert compiled() == ["a"]


def test_the_kernels_are_one_source(build: ModuleType, tmp_path: Path) -> None:
    build.build(tmp_path / "package", tmp_path / "objects")
    text = gzip.decompress((tmp_path / "package" / "_cuda_kernels.cu.gz").read_bytes()).decode()
    assert "#include" not in text
    assert [line for line in text.splitlines() if line.startswith("int")] == [
        "int device;",
        "int a;",
        "int b;",
    ]
