"""Builds the C core as `pylora.backends._core` (cffi, API mode), and the declarations of the CUDA
library as `pylora.backends._cuda_abi` (ABI mode: nothing is compiled or linked); setup.py calls it.

The declarations come from the headers themselves, so that header and binding cannot disagree.
Nothing is compiled for the building machine: each instruction set has its own source files, chosen
at run time.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

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
ffibuilder = FFI()
ffibuilder.cdef(declarations(HEADER.read_text(encoding="utf-8")))
ffibuilder.set_source(
    "pylora.backends._core",
    '#include "pylora.h"',
    sources=sources(),
    include_dirs=["csrc"],
    depends=[str(f.relative_to(ROOT)) for f in ROOT.glob("csrc/**/*.[hi]*")],
    # No contraction: a fused multiply-add happens where the source says so and nowhere else, so
    # that results do not depend on the compiler. -g0 keeps the installed file small.
    extra_compile_args=["/std:c11", "/O2", "/fp:precise", "/experimental:c11atomics"]
    if MSVC
    else ["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"],
    libraries=[] if MSVC else ["m", "pthread"],
)

# `from pylora.backends._cuda_abi import ffi; lib = ffi.dlopen(path of libpylora_cuda)`.
cuda_abi = FFI()
for header in (HEADER, CUDA_HEADER):
    cuda_abi.cdef(declarations(header.read_text(encoding="utf-8"), compiled=False))
cuda_abi.set_source("pylora.backends._cuda_abi", None)

if __name__ == "__main__":
    cuda_abi.compile(verbose=True)
    ffibuilder.compile(verbose=True)
