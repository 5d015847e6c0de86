"""Builds libpylora_cuda with nvcc while the package is built (by setup.py), where it can be used.

PYLORA_CUDA says when: `auto` (default) where an NVIDIA driver and nvcc are here, else the package
is built without the library and a line says why; `on` in any case, and a missing nvcc is an error;
`off` does not look. It takes minutes, which a machine without a GPU has no use for. Beside the
library, or in its place, the package gets the kernels as one source for CuPy's run-time compiler,
and a note for `pylora doctor`.
PYLORA_NVCC_FLAGS are more flags for nvcc, PYLORA_NVCC_JOBS how many run at a time;
PYLORA_CUDA_TARGETS names other GPUs than the usual ones: `90`, or `80,90`, the last as PTX, too.
Nothing of CUDA is linked but its static runtime: building needs no GPU, driver or cuBLAS.
"""

from __future__ import annotations

import gzip
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

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
LIBRARY = "libpylora_cuda.so"
TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installer puts it
KERNELS = "_cuda_kernels.cu.gz"
NOTE = "_cuda_note.txt"

# Machine code for A100 and H100, and PTX that drivers compile for what comes after.
TARGETS = ("80", "90")
DRIVER = Path("/proc/driver/nvidia/version")
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


def driver_here() -> bool:
    """Is there an NVIDIA driver? A toolkit alone says nothing: it is on many machines without."""
    if DRIVER.is_file():
        return True
    tool = shutil.which("nvidia-smi")  # WSL and containers may have no /proc/driver/nvidia
    if tool is None:
        return False
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def targets() -> list[str]:
    """nvcc's -gencode of TARGETS, or of those that PYLORA_CUDA_TARGETS names."""
    asked = os.environ.get("PYLORA_CUDA_TARGETS", "").replace(",", " ").split()
    if not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in asked):
        raise SystemExit(
            f"PYLORA_CUDA_TARGETS is {' '.join(asked)!r}; it may be numbers such as 80,90"
        )
    *first, last = asked or TARGETS
    made = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in first]
    return [*made, f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"]


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
    flags = [*FLAGS, *targets(), f"-I{SOURCES}", f"-I{SOURCES.parent}"]
    flags += os.environ.get("PYLORA_NVCC_FLAGS", "").split()
    objects.mkdir(parents=True, exist_ok=True)

    files = sorted(SOURCES.glob("*.cu"), key=lambda f: -f.stat().st_size)
    # kernels.cu has the same kernels once more, for the run-time compiler.
    files = [f for f in files if f.name != "kernels.cu"]
    begun, lock, finished = time.monotonic(), threading.Lock(), [0]

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
        with lock:
            finished[0] += 1
            seconds = time.monotonic() - begun
            text = f"CUDA: {finished[0]} of {len(files)} files, {seconds:.0f} s ({source.name})"
            print(text, file=sys.stderr, flush=True)
        return made

    with ThreadPoolExecutor(COMPILERS) as pool:
        made = list(pool.map(compile_one, files))
    script = objects / "exports.map"
    script.write_text(EXPORTS, encoding="utf-8")
    link = [nvcc, "-shared", "-cudart=static", *targets(), *map(str, made), "-o", str(target)]
    run([*link, f"-Xlinker=--version-script={script}", "-Xlinker=-s"])
    return version[1] if version else "of an unknown version"


def build(package: Path, objects: Path) -> list[Path]:
    """Puts the kernels' source, a note, and, if it can be built, the library into a folder."""
    package, objects = package.resolve(), objects.resolve()
    package.mkdir(parents=True, exist_ok=True)
    library, note = package / LIBRARY, package / NOTE
    source = flatten(SOURCES / "kernels.cu").encode()
    (package / KERNELS).write_bytes(gzip.compress(source, mtime=0))  # the same bytes every time
    library.unlink(missing_ok=True)
    want, nvcc = wanted(), None
    try:
        if want == "off":
            text = "PYLORA_CUDA was off when pylora was built"
        elif want == "auto" and not driver_here():
            raise BuildError(
                "no NVIDIA driver is here (PYLORA_CUDA=on builds it all the same, with nvcc)"
            )
        elif not (nvcc := find_nvcc()):
            raise BuildError(
                f"no nvcc was found when pylora was built (PATH, CUDA_HOME, CUDA_PATH, {TOOLKIT})"
            )
        else:
            version = compile_library(nvcc, library, objects)
            names = ", ".join(re.findall(r"sm_\w+", " ".join(targets())))
            text = f"built by nvcc {version} for {names} and PTX"
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
