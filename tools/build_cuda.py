"""Builds libpylora_cuda with nvcc, where there is one, while the package is built (by setup.py).

PYLORA_CUDA says what a missing nvcc means: `auto` (default) builds without the library and notes
why, `on` is an error, `off` does not look. Beside the library, or in its place, the package gets
the kernels as one source for CuPy's run-time compiler, and a note for `pylora doctor`.
PYLORA_NVCC_FLAGS are more flags for nvcc, PYLORA_NVCC_JOBS how many run at a time.
Nothing of CUDA is linked but its static runtime: building needs no GPU, driver or cuBLAS.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = "libpylora_cuda.so"
TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installer puts it
KERNELS = "_cuda_kernels.cu"
NOTE = "_cuda_note.txt"

# Machine code for A100 and H100, and PTX that drivers compile for what comes after.
TARGETS = ["arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]"]
FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-ffp-contract=off", "-Xfatbin=-compress-all"]
# Of the library's symbols, those of the header and no others.
EXPORTS = "{ global: pylora_cuda_*; local: *; };\n"
# That run at the same time: each takes a gigabyte for the larger kernels.
COMPILERS = int(os.environ.get("PYLORA_NVCC_JOBS") or 2)


class BuildError(Exception):
    """A sentence that says why there is no library."""


def wanted() -> str:
    """`auto`, `on` or `off`, of the environment."""
    value = os.environ.get("PYLORA_CUDA", "auto").strip().lower() or "auto"
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"PYLORA_CUDA is '{value}'; it may be auto, on or off")
    return value


def find_nvcc() -> str | None:
    """nvcc of PATH, of CUDA_HOME or CUDA_PATH, or of the usual place."""
    found = shutil.which("nvcc")
    if found:
        return found
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), TOOLKIT):
        if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
            return found
    return None


def flatten(path: Path, seen: set[Path] | None = None) -> str:
    """A source with the project's own headers in place of its #include lines, each once."""
    seen = set() if seen is None else seen
    if path in seen:
        return ""
    seen.add(path)

    def included(match: re.Match[str]) -> str:
        for folder in (path.parent, SOURCES, ROOT / "csrc"):
            file = (folder / match[1]).resolve()
            if file.is_file():
                return flatten(file, seen)
        return match[0]  # of the system, or of the tests' emulation

    text = path.read_text(encoding="utf-8")
    return re.sub(r'^#include "([^"]+)".*$', included, text, flags=re.M)


def run(command: list[str]) -> str:
    """What a tool prints; a failure is a BuildError with the end of that."""
    # From the sources' folder, where no header has the name of one of CUDA's.
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name} failed ({done.returncode}):\n{output[-4000:]}")
    return output


def compile_library(nvcc: str, target: Path, objects: Path) -> str:
    """Compiles what changed since the last time, links, and gives nvcc's version."""
    if sys.platform != "linux":
        raise BuildError("the CUDA library is built on Linux alone")
    version = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]))
    targets = [f"-gencode={t}" for t in TARGETS]
    flags = [*FLAGS, *targets, f"-I{SOURCES}", f"-I{SOURCES.parent}"]
    flags += os.environ.get("PYLORA_NVCC_FLAGS", "").split()
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        # An object's name has the hash of all that goes into it.
        text = flatten(source) + repr((nvcc, version and version[1], flags))
        made = objects / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.o"
        if not made.exists():
            for old in objects.glob(f"{source.stem}-*.o"):
                old.unlink()
            unfinished = made.with_suffix(".tmp.o")
            run([nvcc, *flags, "-c", str(source), "-o", str(unfinished)])
            unfinished.rename(made)
        return made

    files = sorted(SOURCES.glob("*.cu"), key=lambda f: -f.stat().st_size)
    with ThreadPoolExecutor(COMPILERS) as pool:
        # kernels.cu has the same kernels once more, for the run-time compiler.
        made = list(pool.map(compile_one, (f for f in files if f.name != "kernels.cu")))
    script = objects / "exports.map"
    script.write_text(EXPORTS, encoding="utf-8")
    link = [nvcc, "-shared", "-cudart=static", *targets, *map(str, made), "-o", str(target)]
    run([*link, f"-Xlinker=--version-script={script}", "-Xlinker=-s"])
    return version[1] if version else "of an unknown version"


def build(package: Path, objects: Path) -> list[Path]:
    """Puts the kernels' source, a note, and, if it can be built, the library into a folder."""
    package, objects = package.resolve(), objects.resolve()
    package.mkdir(parents=True, exist_ok=True)
    library, note = package / LIBRARY, package / NOTE
    (package / KERNELS).write_text(flatten(SOURCES / "kernels.cu"), encoding="utf-8")
    library.unlink(missing_ok=True)
    want, nvcc = wanted(), None
    try:
        if want == "off":
            text = "PYLORA_CUDA was off when pylora was built"
        elif not (nvcc := find_nvcc()):
            raise BuildError(
                f"no nvcc was found when pylora was built (PATH, CUDA_HOME, CUDA_PATH, {TOOLKIT})"
            )
        else:
            text = (
                f"built by nvcc {compile_library(nvcc, library, objects)} for sm_80, sm_90 and PTX"
            )
    except BuildError as error:
        library.unlink(missing_ok=True)
        if want == "on":
            raise SystemExit(
                f"PYLORA_CUDA=on, but libpylora_cuda cannot be built: {error}"
            ) from None
        text = str(error)
        print(f"note: pylora is built without its CUDA library: {error}", file=sys.stderr)
    note.write_text(text + "\n", encoding="utf-8")
    return [f for f in (package / KERNELS, note, library) if f.exists()]


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "pylora" / "backends"
    for made in build(folder, ROOT / "build" / "cuda"):
        print(made)
