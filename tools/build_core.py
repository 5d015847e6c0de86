"""Builds the C core as `pylora.backends._core` (cffi, API mode), and the declarations of the CUDA
library as `pylora.backends._cuda_abi` (ABI mode: nothing is compiled or linked); setup.py calls it.

The declarations come from the headers themselves, so that header and binding cannot disagree.
Nothing is compiled for the building machine: each instruction set has its own source files, chosen
at run time. The core's sources are compiled on all processors at once, those that take longest
first, into objects that the next build finds again by what went into them.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cffi import FFI

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "pylora.h"
CUDA_HEADER = ROOT / "csrc" / "cuda" / "pylora_cuda.h"


def declarations(header: str, *, compiled: bool = True) -> str:
    """The header without comments and preprocessor lines, and its plain numeric constants: for the
    compiler to fill in, or as the numbers they are where nothing is compiled."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    constants = re.findall(r"^#define (PYLORA_\w+) \(?(-?\d+)\)?$", text, flags=re.M)
    text = re.sub(r'#ifdef __cplusplus\n(extern "C" \{|\})\n#endif', "", text)
    text = re.sub(r"^#.*$", "", text, flags=re.M)
    return text + "".join(f"#define {n} {'...' if compiled else v}\n" for n, v in constants)


def sources() -> list[str]:
    """C files of the core relative to the project: all but the plain reference, which tests use."""
    listed = (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8")
    return [f"csrc/{name}" for name in listed.split()]


MSVC = sys.platform == "win32"
# No contraction: a fused multiply-add happens where the source says so and nowhere else, so that
# results do not depend on the compiler. -g0 keeps the installed file small.
FLAGS = (
    ["/std:c11", "/O2", "/fp:precise", "/experimental:c11atomics"]
    if MSVC
    else ["-std=c11", "-O2", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
          "-fno-asynchronous-unwind-tables"]
)  # fmt: skip
# What GCC's -O3 does for these kernels, in half its time: -O2 of clang does as much without.
GCC_FLAGS = ["-ftree-vectorize", "-fvect-cost-model=dynamic", "-fpeel-loops"]
# More flags for the core alone; CI's are -Wall -Wextra -Werror.
FLAGS += os.environ.get("PYLORA_CORE_FLAGS", "").split()


def workers() -> int:
    """Compilers that run at a time: PYLORA_BUILD_JOBS, or as many as there are processors."""
    asked = os.environ.get("PYLORA_BUILD_JOBS", "").strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise SystemExit(f"PYLORA_BUILD_JOBS is {asked!r}; it must be a whole number from 1 on")
    if asked:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def included(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """A source and the project's own headers that it includes, however far down."""
    seen = set() if seen is None else seen
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'^#\s*include "([^"]+)"', path.read_text("utf-8"), flags=re.M):
            for folder in (path.parent, ROOT / "csrc"):
                if (file := (folder / name).resolve()).is_file():
                    included(file, seen)
                    break
    return seen


def effort(path: Path) -> tuple[bool, int]:
    """Sorts by how long a compiler takes, roughly: kernels first, then by what they include."""
    return path.parent.name == "cpu", sum(f.stat().st_size for f in included(path))


def flags_for(command: list[str] | None) -> list[str]:
    """The core's flags for a compiler, such as ["cc", "-fPIC"]; None: MSVC."""
    if not command:
        return FLAGS
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    return FLAGS if "clang" in done.stdout else FLAGS + GCC_FLAGS


def compile_core(compiler: Any, folder: Path) -> list[str]:
    """Compiles what changed with a setuptools compiler; gives the objects' paths, or that of
    libpylora.a with all of them in it, and says on standard error how far it is."""
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted((ROOT / name for name in sources()), key=effort, reverse=True)
    executable = getattr(compiler, "compiler_so", None)
    flags = flags_for(executable)
    command = repr((executable or sys.platform, flags))
    begun, lock, finished = time.monotonic(), threading.Lock(), [0]

    def compile_one(source: Path) -> str:
        digest = hashlib.sha256(command.encode())
        for file in sorted(included(source)):
            digest.update(file.name.encode() + file.read_bytes())
        name = f"{source.parent.name}-{source.stem}"
        made = folder / f"{name}-{digest.hexdigest()[:16]}.o"
        if not made.exists():
            unfinished = folder / f"{made.stem}.{os.getpid()}"  # a folder of its own
            relative = os.path.relpath(source)  # of the compiler's messages and the object's place
            (produced,) = compiler.compile(
                [relative],
                output_dir=str(unfinished),
                include_dirs=[str(ROOT / "csrc")],
                extra_postargs=flags,
            )
            for old in folder.glob(f"{name}-{'?' * 16}.o"):
                old.unlink(missing_ok=True)
            Path(produced).replace(made)
            shutil.rmtree(unfinished, ignore_errors=True)
        with lock:
            finished[0] += 1
            seconds = time.monotonic() - begun
            text = f"C core: {finished[0]} of {len(files)} files, {seconds:.0f} s ({source.name})"
            print(text, file=sys.stderr, flush=True)
        return str(made)

    with ThreadPoolExecutor(workers()) as pool:
        objects = list(pool.map(compile_one, files))
    if MSVC:
        return objects
    library = folder / "libpylora.a"
    library.unlink(missing_ok=True)
    compiler.create_static_lib(objects, "pylora", output_dir=str(folder))
    return [str(library)]


def builder(objects: list[str] | None = None) -> FFI:
    """cffi's part of the core, which is linked with `objects`: setup.py gives them later."""
    ffi = FFI()
    ffi.cdef(declarations(HEADER.read_text(encoding="utf-8")))
    ffi.set_source(
        "pylora.backends._core",
        '#include "pylora.h"',
        include_dirs=["csrc"],
        depends=[str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*.[hi]*")],
        extra_compile_args=FLAGS,
        extra_objects=objects or [],
        libraries=[] if MSVC else ["m", "pthread"],
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],  # no symbols but Python's
    )
    return ffi


ffibuilder = builder()

# `from pylora.backends._cuda_abi import ffi; lib = ffi.dlopen(path of libpylora_cuda)`.
cuda_abi = FFI()
for header in (HEADER, CUDA_HEADER):
    cuda_abi.cdef(declarations(header.read_text(encoding="utf-8"), compiled=False))
cuda_abi.set_source("pylora.backends._cuda_abi", None)

if __name__ == "__main__":  # in place, with nothing but a compiler, cffi and setuptools
    from setuptools._distutils.ccompiler import new_compiler
    from setuptools._distutils.sysconfig import customize_compiler

    os.chdir(ROOT)
    cuda_abi.compile(verbose=True)
    compiler = new_compiler()
    customize_compiler(compiler)
    builder(compile_core(compiler, ROOT / "build" / "core")).compile(verbose=True)
