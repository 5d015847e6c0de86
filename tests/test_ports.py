"""The two ports in examples/ports pass the golden vectors, and notice when a number is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pylora.conformance import vectors

PORTS = Path(__file__).resolve().parents[1] / "examples" / "ports"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vectors.write(tmp_path_factory.mktemp("vectors") / "v1")


@pytest.fixture(scope="module")
def spoilt(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one number of two outputs moved, and digests that say nothing of it."""
    copy = tmp_path_factory.mktemp("spoilt") / "v1"
    shutil.copytree(written, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for case, name in (("lora-plain", "y"), ("block", "dx")):
        entry = next(c for c in manifest["cases"] if c["name"] == case)["outputs"][name]
        file = copy / entry["file"]
        data = bytearray(file.read_bytes())
        (value,) = struct.unpack_from("<d", data, 8)
        struct.pack_into("<d", data, 8, value + 0.01)
        file.write_bytes(data)
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return copy


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)


@pytest.fixture(scope="module")
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("node is not installed, so the JavaScript port cannot run")
    return found


def test_javascript_passes_every_vector(node: str, written: Path) -> None:
    result = run([node, str(PORTS / "check.mjs"), str(written)])
    assert result.returncode == 0, result.stderr
    cases = json.loads((written / "manifest.json").read_text())["cases"]
    assert f"{len(cases)} cases" in result.stdout
    assert " 0 failures" in result.stdout


def test_javascript_notices_a_wrong_number(node: str, spoilt: Path) -> None:
    result = run([node, str(PORTS / "check.mjs"), str(spoilt)])
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "lora-plain/y: 1 of 35 are wrong",
        "block/dx: 1 of 144 are wrong",
    ]


@pytest.fixture(scope="module")
def build(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, cc = shutil.which("make"), shutil.which(os.environ.get("CC", "cc"))
    if not make or not cc:
        pytest.skip("needs make and a C compiler")
    folder = tmp_path_factory.mktemp("build")
    flags = "CFLAGS=-O1 -Wall -Wextra -Wpedantic -Werror"
    where = [f"BUILD={folder}", f"VECTORS={written}", f"CC={cc}", flags]
    result = run([make, "-s", "-C", str(PORTS), "c", *where])
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert result.stdout.count(" 0 wrong") == 2
    return folder


def test_c_passes_its_vectors(build: Path, written: Path) -> None:
    """Each output of every operation of the C interface is checked by one of the programs."""
    results = [run([str(build / name), str(written)]) for name in ("lora", "llama")]
    assert [r.returncode for r in results] == [0, 0]
    checked = sum(int(r.stdout.split()[0]) for r in results)
    # The C interface has no names of streams, no initial values and no whole model; g is inside
    # an operation, and `kept` is y's zeros.
    absent = {"init", "unit", "embedding", "training"}
    want = 0
    for case in json.loads((written / "manifest.json").read_text())["cases"]:
        if case["op"] not in absent:
            want += len([name for name in case["outputs"] if name not in ("g", "kept")])
    assert checked == want


def test_c_notices_a_wrong_number(build: Path, spoilt: Path) -> None:
    for name, complaint in (("lora", "lora-plain/y"), ("llama", "block/dx")):
        result = run([str(build / name), str(spoilt)])
        assert result.returncode == 1
        assert result.stderr == f"{complaint}: 1 numbers are wrong\n"


def test_c_refuses_an_adapter_that_is_cut_off(build: Path, written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "v1"
    shutil.copytree(written, copy)
    file = copy / "embed" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    result = run([str(build / "lora"), str(copy)])
    assert result.returncode == 2
    assert "does not have the shape that the settings say" in result.stderr


def test_ports_are_short_and_stand_alone() -> None:
    for file in PORTS.iterdir():
        if file.suffix in (".mjs", ".c", ".h"):
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) < 200, file.name
            assert "require(" not in text
    imports = (PORTS / "lora.mjs").read_text(encoding="utf-8")
    assert [line for line in imports.splitlines() if line.startswith("import ")] == [
        'import { createHash } from "node:crypto";'
    ]


def test_both_references_have_the_same_operations_in_the_same_order() -> None:
    """csrc/reference.c and pylora/reference.py are read side by side: sections and names agree."""
    root = PORTS.parents[1]
    in_c = (root / "csrc" / "reference.c").read_text(encoding="utf-8")
    in_python = (root / "pylora" / "reference.py").read_text(encoding="utf-8")
    operations = re.compile(r"^\w+ pylora_ref_(\w+)\(|^/\* -{4} (.+?) -+ \*/", re.M)
    methods = re.compile(r"^    def ([a-z]\w+)\(|^    # -{4} (.+?) -+$", re.M)
    assert operations.findall(in_c) == methods.findall(in_python)
    assert len(operations.findall(in_c)) == 24
