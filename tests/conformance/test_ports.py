"""The two ports in examples/ports pass the golden vectors, and notice when a number is wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from core import core_lib

from pylora.conformance.vectors import cases as vectors
from pylora.conformance.vectors.all import all_cases, all_questions
from pylora.conformance.vectors.score import ABSENT, FAILED, PASSED, score

# pylora.h, the port's own two, and the standard library of C11.
C_HEADERS = {'"pylora.h"', '"port.h"', '"vectors.h"'} | {
    f"<{name}.h>" for name in ("float", "math", "stdint", "stdio", "stdlib", "string")
}
PORTS = Path(__file__).resolve().parents[2] / "examples" / "ports"


@pytest.fixture(scope="module")
def cases() -> list[vectors.Case]:
    return all_cases()


@pytest.fixture(scope="module")
def written(cases: list[vectors.Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vectors.write(tmp_path_factory.mktemp("vectors") / "v1", cases, all_questions())


@pytest.fixture(scope="module")
def spoilt(written: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The same with one number of every output moved to just outside its bound (or by one bit), and
    digests that say nothing of it; with what a port has to say about each."""
    copy = tmp_path_factory.mktemp("spoilt") / "v1"
    shutil.copytree(written, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    complaints = []
    for case in manifest["cases"]:
        for name, entry in case["outputs"].items():
            file, n = copy / entry["file"], math.prod(entry["shape"])
            if not n:
                continue
            data = bytearray(file.read_bytes())
            if "bound" in entry:
                (bound,) = struct.unpack_from("<d", (copy / entry["bound"]["file"]).read_bytes())
                (value,) = struct.unpack_from("<d", data)
                beyond = value + 2 * bound + 1e-300
                struct.pack_into("<d", data, 0, beyond if beyond > value else value * 2)
            else:
                data[0] ^= 1
            file.write_bytes(data)
            entry["sha256"] = hashlib.sha256(data).hexdigest()
            complaints.append(f"{case['name']}/{name}: 1 of {n} are wrong")
    write_manifest(copy, manifest)
    numbers = {
        c["name"]
        for c in manifest["cases"]
        if any(0 not in o["shape"] for o in c["outputs"].values())
    }
    assert {c.split("/")[0] for c in complaints} == numbers
    return copy, complaints


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """As `pylora vectors` writes it: readers without JSON rely on that."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (folder / "manifest.json").write_text(text, encoding="utf-8")


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


def test_javascript_writes_what_is_checked(
    node: str, written: Path, cases: list[vectors.Case], tmp_path: Path
) -> None:
    """Every case as files, and the answers about plans; nothing about files and converters."""
    assert run([node, str(PORTS / "check.mjs"), str(written), str(tmp_path)]).returncode == 0
    found = score(tmp_path, cases, all_questions())
    assert not found.of(FAILED) and not found.foreign
    asked = {item.name.split("/")[0] for item in found.of(ABSENT)}
    assert asked == {"files", "converters"}
    assert sum(item.name.startswith("plans/") for item in found.of(PASSED)) > 50
    assert found.states()["T-4"] == found.states()["M-8"] == "passed"


def test_javascript_notices_a_wrong_number(node: str, spoilt: tuple[Path, list[str]]) -> None:
    result = run([node, str(PORTS / "check.mjs"), str(spoilt[0])])
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == sorted(spoilt[1])


def test_javascript_notices_a_wrong_answer(node: str, written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "v1"
    shutil.copytree(written, copy)
    plans = json.loads((copy / "plans.json").read_text())
    for case in plans["cases"]:
        if case["name"] == "list":
            case["expect"]["modules"].popitem()
        if case["name"] == "rslora":
            case["expect"]["modules"]["model.layers.3.self_attn.q_proj"]["scale"] = 2
        if case["name"] == "regex-part":
            case["expect"] = {"modules": {}}
        if case["name"] == "regex":
            case["expect"] = {"refused": "no"}
    (copy / "plans.json").write_text(json.dumps(plans))
    result = run([node, str(PORTS / "check.mjs"), str(copy)])
    wrong = ("list", "regex", "regex-part", "rslora")
    said = [f"plans/{name}: is wrong" for name in wrong]
    assert sorted(result.stderr.splitlines()) == sorted(said)


@pytest.fixture(scope="module")
def tool() -> Any:
    path = PORTS.parents[1] / "tools" / "break_ports.py"
    spec = importlib.util.spec_from_file_location("break_ports", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["break_ports"] = module  # its dataclass asks for it
    spec.loader.exec_module(module)
    return module


def test_every_break_applies_and_every_exception_is_still_there(tool: Any) -> None:
    lines = {f: (PORTS / f).read_text(encoding="utf-8").split("\n") for f in files(tool)}
    for some in (tool.breaks("js"), tool.breaks("c")):
        assert len(some) > 250 and len({(b.file, b.before, b.after, b.line) for b in some}) > 250
        for b in some:
            assert b.applied("\n".join(lines[b.file])) != "\n".join(lines[b.file])
    for file, before, _, why in tool.SAME:
        assert any(line.strip() == before for line in lines[file]), (file, before)
        assert why


def files(tool: Any) -> list[str]:
    return [*tool.FILES["js"], *tool.FILES["c"]]


def test_a_sample_of_broken_ports_is_noticed(tool: Any, node: str, written: Path) -> None:
    """tools/break_ports.py tries them all."""
    some = tool.sample("js", 16, seed=4)
    assert not tool.survivors("js", written, some)


def test_a_port_that_is_not_broken_is_not_said_to_be(tool: Any, node: str, written: Path) -> None:
    file, before, after, _ = tool.SAME[0]
    text = (PORTS / file).read_text(encoding="utf-8")
    number = [line.strip() for line in text.split("\n")].index(before) + 1
    line = text.split("\n")[number - 1]
    same = tool.Break(file, number, line, line.replace(before, after), "nothing")
    assert tool.survivors("js", written, [same]) == [same]


@pytest.fixture(scope="module")
def build(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make, cc = shutil.which("make"), shutil.which(os.environ.get("CC", "cc"))
    if not make or not cc:
        pytest.skip("needs make and a C compiler")
    folder = tmp_path_factory.mktemp("build")
    flags = "CFLAGS=-O1 -Wall -Wextra -Wpedantic -Werror"
    where = [f"BUILD={folder}", f"VECTORS={written}", f"CC={cc}", core_lib(make, cc), flags]
    result = run([make, "-s", "-C", str(PORTS), "c", *where])
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return folder / "check"


def test_c_passes_every_vector(build: Path, written: Path) -> None:
    """Every output of every case: a case, an operation or an output that is left out fails."""
    result = run([str(build), str(written)])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    cases = json.loads((written / "manifest.json").read_text())["cases"]
    outputs = [out for case in cases for out in case["outputs"].values()]
    numbers = sum(math.prod(out["shape"]) for out in outputs)
    assert result.stdout.startswith(f"{len(cases)} cases, {numbers} numbers, 0 failures;")


def test_c_writes_what_is_checked(
    build: Path, written: Path, cases: list[vectors.Case], tmp_path: Path
) -> None:
    """All cases in one JSON file."""
    outputs = tmp_path / "outputs.json"
    assert run([str(build), str(written), str(outputs)]).returncode == 0
    found = score(outputs, cases, all_questions())
    assert not found.of(FAILED) and not found.foreign
    asked = {item.name.split("/")[0] for item in found.of(ABSENT)}
    assert asked == {"plans", "files", "converters"}


def test_c_notices_a_wrong_number(build: Path, spoilt: tuple[Path, list[str]]) -> None:
    result = run([str(build), str(spoilt[0])])
    assert result.returncode == 1
    assert sorted(result.stderr.splitlines()) == sorted(spoilt[1])


@pytest.mark.parametrize("what", ["operation", "output"])
def test_c_notices_what_it_does_not_compute(
    what: str, build: Path, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written, tmp_path / "v1")
    manifest = json.loads((written / "manifest.json").read_text())
    case = next(c for c in manifest["cases"] if c["name"] == "unit")
    if what == "operation":
        case["op"] = "gelu"
        expected = (2, "gelu: is an operation that this program does not know\n")
    else:
        case["outputs"]["w"] = case["outputs"]["u"]
        expected = (1, "unit: 1 of its 2 outputs were checked\n")
    write_manifest(tmp_path / "v1", manifest)
    result = run([str(build), str(tmp_path / "v1")])
    assert (result.returncode, result.stderr) == expected


def test_c_refuses_a_file_that_was_changed(build: Path, written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "v1")
    file = tmp_path / "v1" / "training" / "lr.bin"
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    result = run([str(build), str(tmp_path / "v1")])
    assert (result.returncode, result.stderr) == (2, "training/lr.bin: was changed\n")


def test_c_refuses_an_adapter_that_is_cut_off(build: Path, written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "v1"
    shutil.copytree(written, copy)
    file = copy / "embed" / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    result = run([str(build), str(copy)])
    assert result.returncode == 2
    assert "does not have the shape that the settings say" in result.stderr


def test_ports_are_short_and_stand_alone() -> None:
    for file in PORTS.iterdir():
        if file.suffix in (".mjs", ".c", ".h"):
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) < 200, file.name
            assert "require(" not in text
            for header in re.findall(r"^#include (.+)$", text, re.M):
                assert header in C_HEADERS, f"{file.name} includes {header}"
    imports = (PORTS / "lora.mjs").read_text(encoding="utf-8")
    assert [line for line in imports.splitlines() if line.startswith("import ")] == [
        'import { createHash } from "node:crypto";'
    ]


def test_both_references_have_the_same_operations_in_the_same_order() -> None:
    """csrc/reference.c and pylora/reference.py are read side by side: sections and names agree.

    What families add is in a file of its own in Python (ops/formulas.py, ops/mixture.py) and stands
    behind the gates in C; so is merging (ops/merge.py). DoRA's (ops/decomposed.py) has no C.
    """
    root = PORTS.parents[1]
    in_c = (root / "csrc" / "reference.c").read_text(encoding="utf-8")
    in_python = (root / "pylora" / "reference.py").read_text(encoding="utf-8")
    operations = re.compile(r"^\w+ pylora_ref_(\w+)\(|^/\* -{4} (.+?) -+ \*/", re.M)
    methods = re.compile(r"^    def ([a-z]\w+)\(|^    # -{4} (.+?) -+$", re.M)
    single = methods.findall(in_python)
    assert len(single) == 22
    merging = methods.findall((root / "pylora/ops/merge.py").read_text(encoding="utf-8"))
    merges = single.index(("", "transformer"))
    single[merges:merges] = [("", "merge and exact unmerge"), *merging]
    of_families = methods.findall((root / "pylora/ops/formulas.py").read_text(encoding="utf-8"))
    of_families.remove(("capped", ""))  # a part of the others
    gates = single.index(("swiglu_backward", "")) + 1
    single[gates:gates] = [*of_families, ("choose", "")]
    assert operations.findall(in_c) == single
