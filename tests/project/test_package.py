"""The package as it is installed: its metadata, and what it ships."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pylora
from pylora import extras
from pylora.commands.doctor import examine
from pylora.extras import BRINGS, EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGE = Path(pylora.__file__).parent

try:
    DISTRIBUTION = importlib.metadata.distribution(extras.DISTRIBUTION)
except importlib.metadata.PackageNotFoundError:  # tests may run on the source tree
    DISTRIBUTION = None
installed = pytest.mark.skipif(DISTRIBUTION is None, reason="pylora is not installed")


def test_one_version() -> None:
    assert re.search(rf'^version = "{re.escape(pylora.__version__)}"$', PROJECT, re.MULTILINE)


def promised(extra: str) -> str:
    """What pyproject.toml lists for an extra, or for the plain install."""
    name = re.escape(extra) if extra else "dependencies"
    found = re.search(rf"^{name} = \[(.*?)\]$", PROJECT, re.MULTILINE | re.DOTALL)
    assert found, f"pyproject.toml has no extra {extra!r}"
    return found[1]


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_the_extra_that_an_error_names_brings_the_package(module: str) -> None:
    package = {"yaml": "pyyaml"}.get(module, module).replace("_", "[-_]")
    assert re.search(rf'"{package}\b', promised(EXTRAS[module]), re.IGNORECASE)


def test_doctor_has_a_line_for_each_extra() -> None:
    own = {"all", "parity", "lint"}  # others together, or for working on pylora
    table = PROJECT[PROJECT.index("[project.optional-dependencies]") :]
    names = re.findall(r"^([a-z]+) = \[", table[: table.index("\n[", 1)], re.MULTILINE)
    assert set(names) - own == set(BRINGS) - {""} == set(EXTRAS.values()) - {""}
    lines = {step.what: step for step in examine() if step.what.startswith(("extra", "plain"))}
    assert set(lines) == {"plain install", *(f"extra {n}" for n in BRINGS if n)}
    for step in lines.values():
        assert step.state == "ok" or "pip install" in step.advice


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras.EXTRAS, "no_such_module", "plot")
    (step,) = (s for s in examine() if s.what == "extra plot")
    assert step.state == "optional" and "not installed: no_such_module" in step.text
    assert step.advice == "pip install 'pylora-engine[plot]'"


def test_nothing_tells_to_install_somebody_elses_package() -> None:
    """On PyPI the name `pylora` is a radio's driver."""
    folders = ("pylora", "docs", "tools", "tests", "bench", "examples", "csrc")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*")]
    kinds = (".py", ".md", ".sh", ".cu", ".c", ".h")
    texts = [f for f in files if f.suffix in kinds and f != Path(__file__)]
    for path in [*ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile", *texts]:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"pip install ['\"]?pylora(?!-engine)|['\"]pylora\[\w", text)
        assert not found, f"{path.relative_to(ROOT)}: {found[0]!r}"


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "demo/data/notation/train.jsonl",
        "backends/_cuda_kernels.cu.gz",
        "backends/_cuda_note.txt",
    ],
)
def test_files_that_are_shipped(name: str) -> None:
    assert (PACKAGE / name).is_file()


@installed
def test_only_the_promised_dependencies() -> None:
    assert DISTRIBUTION is not None
    needed = [r for r in DISTRIBUTION.requires or () if "extra ==" not in r]
    names = {re.split(r"[^\w-]", r)[0] for r in needed}
    assert names == {"numpy", "cffi", "safetensors", "tokenizers", "jinja2", "typer", "rich"}


@installed
def test_the_installed_size_is_small() -> None:
    """6.5 MB of everything but the CUDA library, which is there only if nvcc was, and holds each
    kernel three times (sm_80, sm_90, PTX): it has a bound of its own."""
    sizes = {
        p.relative_to(PACKAGE): p.stat().st_size
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    library = sizes.pop(Path("backends/libpylora_cuda.so"), 0)
    assert sum(sizes.values()) < 6_500_000
    assert library < 20_000_000


def test_python_m_pylora_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pylora", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for verb in ("train", "generate", "merge", "unmerge", "plan", "inspect", "demo"):
        assert verb in result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_importing_and_a_first_layer_take_little_memory() -> None:
    program = """
import numpy, pylora
from pylora import LoRA, LoRALinear, backends
layer = LoRALinear("w", numpy.ones((64, 64), "f4"), ops=backends.get())
layer.lora = LoRA(numpy.ones((4, 64), "f4"), numpy.ones((64, 4), "f4"), 2.0)
assert (layer.forward(numpy.ones((3, 64), "f4"))[0] == 64 + 2 * 4 * 64).all()
status = open("/proc/self/status").read()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60_000  # kB; half of it is NumPy
