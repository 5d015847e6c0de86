"""The installed library: what it exports, and that programs are built with it both ways and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clibrary import PREFIX, library, needs_library, python_model
from small_models import REAL, write_gguf

import pylora
from pylora.adapters.adapter import Adapter
from pylora.adapters.loraconfig import LoraConfig
from pylora.adapters.plan import resolve
from pylora.generation.generate import generate

pytestmark = needs_library
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c"
HEADERS = ("pylora.h", "pylora_files.h", "pylora_model.h")
CC = os.environ.get("CC", "cc")


def run(*command: object, where: Path | None = None, **environment: str) -> str:
    result = subprocess.run(
        [str(c) for c in command],
        cwd=where,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def needs(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def folder_of(name: str) -> Path:
    return next(PREFIX.rglob(name)).parent


def declared() -> set[str]:
    """The functions that the public headers declare."""
    names: set[str] = set()
    for header in HEADERS:
        text = (PREFIX / "include" / header).read_text(encoding="utf-8")
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        names |= set(re.findall(r"\b(pylora_\w+)\s*\([^;{]*\);", text))
    return names


def test_the_shared_library_exports_its_headers_and_nothing_else() -> None:
    needs("nm")
    lines = run("nm", "-D", "--defined-only", folder_of("libpylora.so") / "libpylora.so")
    exported = {line.split()[-1].split("@")[0] for line in lines.splitlines()}
    assert exported == declared()


def test_the_static_library_has_no_name_without_prefix() -> None:
    """What a program is linked with may not collide with its own names."""
    needs("nm")
    lines = run("nm", "-g", "--defined-only", folder_of("libpylora.a") / "libpylora.a")
    names = {line.split()[-1] for line in lines.splitlines() if len(line.split()) == 3}
    assert names > declared()
    assert all(name.startswith("pylora_") for name in names)


def test_versions_agree() -> None:
    needs("readelf", "pkg-config")
    abi = library().pylora_abi_version()
    library_file = folder_of("libpylora.so") / "libpylora.so"
    assert f"libpylora.so.{abi}" in run("readelf", "-d", library_file)
    assert library_file.resolve().name == f"libpylora.so.{pylora.__version__}"
    assert pkg_config("--modversion").strip() == pylora.__version__


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_header_stands_alone(header: str, language: str, tmp_path: Path) -> None:
    compiler = CC if language == "c" else os.environ.get("CXX", "c++")
    needs(compiler)
    source = tmp_path / "one.source"
    source.write_text(f"#include <{header}>\nint main(void) {{ return 0; }}\n")
    standard = "-std=c11" if language == "c" else "-std=c++11"
    strict = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    include = f"-I{PREFIX / 'include'}"
    run(compiler, standard, *strict, include, "-x", language, "-fsyntax-only", source)


def pkg_config(*arguments: str) -> str:
    where = str(folder_of("pylora.pc"))
    return run("pkg-config", *arguments, "pylora", PKG_CONFIG_PATH=where)


def with_pkg_config(folder: Path, *, static: bool) -> Path:
    needs("pkg-config", CC)
    flags = pkg_config("--cflags", "--libs", *(["--static"] if static else [])).split()
    if static:  # of both libraries, the one that is a file
        flags = [f"-l:{'libpylora.a'}" if f == "-lpylora" else f for f in flags]
    else:
        flags.append(f"-Wl,-rpath,{folder_of('libpylora.so')}")
    strict = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"]
    for name in ("embed", "generate"):
        run(CC, *strict, EXAMPLE / f"{name}.c", *flags, "-o", folder / name)
    return folder / "generate"


def with_cmake(folder: Path, *, static: bool) -> Path:
    needs("cmake", CC)
    target = "pylora::static" if static else "pylora::shared"
    cache = f"-DCMAKE_PREFIX_PATH={PREFIX}"
    run("cmake", "-S", EXAMPLE, "-B", folder, cache, f"-DPYLORA_TARGET={target}", CC=CC)
    run("cmake", "--build", folder)
    return folder / "generate"


BUILDS = {"pkg-config": with_pkg_config, "cmake": with_cmake}


def fnv(data: bytes) -> str:
    h = 14695981039346656037
    for byte in data:
        h = ((h ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


@pytest.mark.parametrize("static", [False, True], ids=["shared", "static"])
@pytest.mark.parametrize("build", BUILDS)
def test_the_example_prints_what_python_prints(build: str, static: bool, tmp_path: Path) -> None:
    """The ids of pylora.generation, and the bits of all logits that they were chosen from."""
    program = BUILDS[build](tmp_path, static=static)
    linked = run("readelf", "-d", program) if shutil.which("readelf") else ""
    assert not linked or ("libpylora.so" in linked) != static
    path = tmp_path / "m.gguf"
    write_gguf(path)
    check_program(program, path, tmp_path / "a", "fp32", 4)
    assert "unmerged: bit for bit the base" in run(program.with_name("embed"))


@pytest.mark.skipif(not REAL.exists(), reason="needs the weights of SmolLM2")
def test_the_example_on_the_real_model(tmp_path: Path) -> None:
    program = with_pkg_config(tmp_path, static=False)
    check_program(program, REAL, tmp_path / "a", "fp32", 3)


def check_program(program: Path, path: Path, adapter: Path, precision: str, count: int) -> None:
    model = python_model(path, precision)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    own = Adapter.init(resolve(settings, model.config.modules()), settings, 3)
    own.save(adapter)
    model.attach(own)
    prompt = [5, 3, 7, 11, 2]
    ids = generate(model, [prompt], count, eos_ids=())[0]
    kv, logits = model.kv_cache(1, 64), []
    for new in (prompt, *([i] for i in ids[:-1])):
        logits.append(np.array(model.decode(new, kv, [len(new)])[0]))
    output = run(program, path, adapter, precision, count, *prompt)
    lines = output.splitlines()
    assert lines[0].split() == [str(i) for i in ids]
    assert lines[1] == f"logits {fnv(np.stack(logits).tobytes())}"


def test_the_example_says_what_is_wrong(tmp_path: Path) -> None:
    program = with_pkg_config(tmp_path, static=False)
    path = tmp_path / "m.gguf"
    write_gguf(path)
    for arguments, says in (
        ((), "usage"),
        ((path, "-", "fp8", 1, 1), "no precision 'fp8'"),
        ((path, "-", "fp32", 1, "x"), "'x' is not a token id"),
        ((path, "-", "fp32", 1, 300), "outside the vocabulary 0 .. 299"),
        ((path, "-", "fp32", 60, *range(5)), "a sequence of 65 tokens"),
        ((path, tmp_path / "none", "fp32", 1, 1), "no such file"),
        ((tmp_path, "-", "fp32", 1, 1), "config.json"),
    ):
        command = [str(program), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.returncode in (1, 2) and says in result.stderr, result.stderr
