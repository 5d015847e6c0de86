"""The distribution pylora-conformance: the kit alone, in pure Python, beside pylora or without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import pylora

pytest.importorskip("hypothesis")
pytest.importorskip("ml_dtypes")

from pylora.conformance import LAWS

ROOT = Path(__file__).parents[2]
# What it declares that it needs; hypothesis needs sortedcontainers (or, by version, does not).
NEEDS = ("numpy", "hypothesis", "ml_dtypes", "safetensors", "sortedcontainers")
MINE = """
from pylora_conformance.correct.plain import Correct

class Mine(Correct):
    name = "mine"

class Wrong(Correct):
    def forward(self, x, W, A, B, scale, bias=None):
        return super().forward(x, W, A, B, scale * 2, bias)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that runs Python with the built wheel and what it declares, and nothing else."""
    if find_spec("setuptools") is None or find_spec("pip") is None:
        pytest.skip("pip and setuptools build the wheel")
    place = tmp_path_factory.mktemp("kit")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*pip, "-w", str(place), str(ROOT / "conformance")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    site = place / "site"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(site)
    tops = {name.split("/")[0] for name in names}
    assert tops == {"pylora_conformance", f"pylora_conformance-{pylora.__version__}.dist-info"}
    assert not [n for n in names if n.endswith((".so", ".pyd", ".c", ".h", ".cu"))]
    for need in NEEDS:
        spec = find_spec(need)
        if spec is None:
            continue
        where = Path(spec.origin)
        where = where.parent if where.name.startswith("__init__") else where
        for part in where.parent.glob(f"*{need}*"):  # its .libs, .dist-info and globals as well
            if not (site / part.name).exists():
                (site / part.name).symlink_to(part)
    (place / "mine.py").write_text(MINE)

    def run(*args):
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env |= {"PYTHONPATH": f"{site}{os.pathsep}{place}", "PYTHONDONTWRITEBYTECODE": "1"}
        python = [sys.executable, "-S", *args]
        return subprocess.run(python, cwd=place, env=env, capture_output=True, text=True)

    return run


def test_it_needs_no_pylora_and_finds_what_is_wrong(alone):
    done = alone("-c", "import pylora_conformance.correct.plain, sys; import pylora")
    assert "No module named 'pylora'" in done.stderr
    kit = ("-m", "pylora_conformance", "--examples", "12")
    laws = [word for id in ("S1", "F1", "K1", "T1", "A1", "P2") for word in ("--law", id)]
    done = alone(*kit, *laws, "mine:Mine")
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout + done.stderr
    done = alone(*kit, "--law", "F1", "mine:Wrong")
    assert done.returncode == 1 and "np.array" in done.stdout, done.stdout + done.stderr


def test_laws_of_every_file_run_there(alone):
    """What a law imports when it is called is there too: the first law of each file of laws, but
    for those of sizes, which take long and import nothing else."""
    first = {law.check.__module__: id for id, law in reversed(LAWS.items())}
    ids = [id for module, id in first.items() if "sizes" not in module]
    words = [word for id in ids for word in ("--law", id)]
    done = alone("-m", "pylora_conformance", "--examples", "1", *words, "mine:Mine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert f"{len(ids)} passed, 0 FAILED, 0 BROKEN, 0 not tested" in done.stdout


def test_everything_in_it_can_be_imported_and_its_vectors_made(alone):
    code = (
        "import pkgutil, importlib, pylora_conformance as p\n"
        "for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "    if '.engine' not in m.name and not m.name.endswith('__main__'):\n"
        "        importlib.import_module(m.name)\n"
        "from pylora_conformance.vectors.all import all_cases\n"
        "print(len(all_cases()) > 20, len(p.LAWS) > 100, p.run, p.LoRAConformance)"
    )
    done = alone("-c", code)
    assert done.stdout.startswith("True True"), done.stderr


def test_its_declarations_are_those_of_the_extra():
    own = (ROOT / "conformance" / "pyproject.toml").read_text(encoding="utf-8")
    whole = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{pylora.__version__}"' in own
    for need in ("hypothesis", "ml_dtypes", "numpy", "safetensors"):
        (said,) = set(re.findall(rf'"({need}>=[\d.]+)"', own))
        assert f'"{said}"' in whole
