"""The package as it is installed: its metadata, and what it ships."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pylora
from pylora.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PACKAGE = Path(pylora.__file__).parent

try:
    DISTRIBUTION = importlib.metadata.distribution("pylora")
except importlib.metadata.PackageNotFoundError:  # tests may run on the source tree
    DISTRIBUTION = None
installed = pytest.mark.skipif(DISTRIBUTION is None, reason="pylora is not installed")


def test_one_version() -> None:
    assert re.search(rf'^version = "{re.escape(pylora.__version__)}"$', PROJECT, re.MULTILINE)


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_the_extra_that_an_error_names_brings_the_package(module: str) -> None:
    names = re.search(rf"^{EXTRAS[module]} = \[(.*)\]$", PROJECT, re.MULTILINE)
    assert names and re.search(rf'"{module}\b', names[1], re.IGNORECASE)


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "demo/data/notation/train.jsonl",
        "backends/_cuda_kernels.cu",
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
    assert names == {"numpy", "cffi", "safetensors"}


@installed
def test_the_installed_size_is_small() -> None:
    """5 MB of everything but the CUDA library, which is there only if nvcc was, and holds each
    kernel three times (sm_80, sm_90, PTX): it has a bound of its own."""
    sizes = {
        p.relative_to(PACKAGE): p.stat().st_size
        for p in PACKAGE.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    library = sizes.pop(Path("backends/libpylora_cuda.so"), 0)
    assert sum(sizes.values()) < 5_000_000
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
