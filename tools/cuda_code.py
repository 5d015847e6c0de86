"""Looks at the machine code of libpylora_cuda for what its sources mean: no GPU is needed.

    # needs cuobjdump and nvdisasm
    python tools/cuda_code.py library pylora/backends/libpylora_cuda.so
    # needs libnvrtc
    python tools/cuda_code.py nvrtc pylora/backends/_cuda_kernels.cu.gz

`library`: every kernel is there for sm_80 and sm_90, and as PTX; none keeps variables in local
memory (a spill, or an array that is indexed at run time) unless EXCEPTIONS says why; the kernels
that are made for tensor cores use them, with asynchronous copies and matrix loads. A table of
registers and shared memory is printed.
`nvrtc`: the kernels of the cupy backend compile as CuPy compiles them, with nothing of the system.
The tools are NVIDIA's, of a CUDA toolkit or of PyPI: nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm,
nvidia-cuda-nvrtc.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

TARGETS = ("sm_80", "sm_90")

# Kernels that may use local memory: what their names match, and why that costs nothing.
EXCEPTIONS: dict[str, str] = {}

# Instructions that kernels must have: what their names match, and what the code must match.
BF16, F16 = r"HMMA\.16816\.F32\.BF16.*", r"HMMA\.16816\.F32(?!\.BF16).*"
ATTENTION = r"pylora_attention_(forward|keys|rows|dk|dv)_"
CLAIMS: list[tuple[str, str, str]] = [
    (rf"{ATTENTION}bf16_\w+|pylora_few_rows_bf16", BF16, "products of bfloat16 on tensor cores"),
    (rf"{ATTENTION}f16_\w+|pylora_few_rows_f16", F16, "products of float16 on tensor cores"),
    # Those of the low-rank path split factors into parts of one type or the other.
    (r"pylora_low_(down_[AB]|up_[AB]|outer)(_\w+)?", r"HMMA\..*", "products on tensor cores"),
    (rf"{ATTENTION}b?f16_\w+", r"LDGSTS\b.*", "asynchronous copies"),
    (rf"{ATTENTION}b?f16_\w+", r"LDSM\b.*", "loads of matrices from shared memory"),
]


@dataclass
class Kernel:
    """What one target's machine code of a kernel says."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    code: dict[str, int] = field(default_factory=dict)  # opcode with its modifiers: how often

    def count(self, opcode: str) -> int:
        return sum(n for name, n in self.code.items() if re.fullmatch(opcode, name))


def find_tool(name: str) -> str:
    """A program of PATH, of the toolkit, or of a wheel beside this Python's packages."""
    folders = [*map(Path, sys.path), Path("/usr/local/cuda")]
    places = [str(f / "nvidia" / v / "bin") for f in folders for v in ("cu13", "cu12")]
    places += ["/usr/local/cuda/bin"]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))
    if not found:
        raise SystemExit(f"there is no {name}: pip install nvidia-cuda-{name}")
    return found


def dump(tool: str, *arguments: str) -> str:
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(find_tool('nvdisasm')).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join([tool, *arguments])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def read_library(library: Path, target: str) -> dict[str, Kernel]:
    """The kernels of a target by name."""
    tool = find_tool("cuobjdump")
    kernels: dict[str, Kernel] = {}
    usage = dump(tool, "-res-usage", "-arch", target, str(library))
    for name, regs, stack, shared, local in re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
    ):
        kernels[name] = Kernel(int(regs), int(stack) + int(local), int(shared))
    kernel = Kernel()
    for line in dump(tool, "-sass", "-arch", target, str(library)).splitlines():
        if start := re.search(r"Function : (\w+)", line):
            kernel = kernels[start[1]]
        # /*0010*/  @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        elif op := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            kernel.code[op[1]] = kernel.code.get(op[1], 0) + 1
    return kernels


def complaints(target: str, kernels: dict[str, Kernel]) -> list[str]:
    """Sentences about what is not as it should be."""
    found = []
    for name, kernel in sorted(kernels.items()):
        local = kernel.stack or kernel.count(r"(LDL|STL)\b.*")
        if local and not any(re.fullmatch(pattern, name) for pattern in EXCEPTIONS):
            found.append(f"{name} ({target}) keeps {kernel.stack} bytes in local memory")
        if not kernel.code:
            found.append(f"{name} ({target}) has no code")
    for pattern, opcode, meaning in CLAIMS:
        named = [name for name in kernels if re.fullmatch(pattern, name)]
        if not named:
            found.append(f"no kernel of {target} is named {pattern}, which should have {meaning}")
        found += [
            f"{name} ({target}) has no {meaning}"
            for name in named
            if not kernels[name].count(opcode)
        ]
    return found


def check_library(library: Path) -> int:
    read = {target: read_library(library, target) for target in TARGETS}
    found = [text for target in TARGETS for text in complaints(target, read[target])]
    names = {target: set(kernels) for target, kernels in read.items()}
    for pattern in EXCEPTIONS:
        if not any(
            re.fullmatch(pattern, name) and kernel.stack
            for kernels in read.values()
            for name, kernel in kernels.items()
        ):
            found.append(f"no kernel needs the exception {pattern}")
    for target in TARGETS:
        missing = set().union(*names.values()) - names[target]
        found += [f"{name} is missing for {target}" for name in sorted(missing)]
    ptx = dump(find_tool("cuobjdump"), "-ptx", str(library))
    entries = set(re.findall(r"\.entry (\w+)", ptx))
    found += [f"{n} has no PTX for later GPUs" for n in sorted(names[TARGETS[-1]] - entries)]
    width = max(map(len, names[TARGETS[-1]]), default=0)
    print(f"{'kernel':{width}}  " + "  ".join(f"{t}: regs shared tensor" for t in TARGETS))
    for name in sorted(names[TARGETS[-1]]):
        cells = [read[t].get(name, Kernel()) for t in TARGETS]
        print(
            f"{name:{width}}  "
            + "  ".join(f"{k.registers:11} {k.shared:6} {k.count('HMMA.*'):6}" for k in cells)
        )
    for text in found:
        print(f"WRONG: {text}")
    if not any(names.values()):
        found.append("no kernels")
    print(f"{len(names[TARGETS[-1]])} kernels, {len(found)} complaints")
    return 1 if found else 0


# ---- NVRTC ----


def load_nvrtc(path: str | None) -> ctypes.CDLL:
    folders = [Path(p) / "nvidia" / v / "lib" for p in sys.path for v in ("cu13", "cuda_nvrtc")]
    names = [*(str(f) for d in folders for f in sorted(d.glob("libnvrtc.so.*"))), "libnvrtc.so"]
    for name in [path] if path else names:
        for builtins in Path(name).parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))  # which NVRTC would look for on the system alone
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit("there is no libnvrtc: pip install nvidia-cuda-nvrtc")


def check_nvrtc(source: Path, nvrtc: ctypes.CDLL) -> int:
    """Compiles for every target, without any include path."""
    text = gzip.decompress(source.read_bytes())
    expected = set()
    for target in ("compute_80", "compute_90"):
        program = ctypes.c_void_p()
        status = nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), text, source.stem.encode(), 0, None, None
        )
        if status:
            raise SystemExit(f"nvrtcCreateProgram failed ({status})")
        # The options of pylora/backends/cupy/kernels.py: the kernels that CuPy compiles. 177: a
        # function of device.cuh that no kernel happens to use.
        flags = [b"-std=c++17", b"-DPYLORA_SMALL_KERNELS", b"-diag-suppress=177"]
        flags.append(f"--gpu-architecture={target}".encode())
        status = nvrtc.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        message = log.value.decode(errors="replace").strip()
        if status or message:
            print(f"NVRTC, {target}: {message}")
        if status:
            return 1
        nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
        ptx = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetPTX(program, ptx)
        entries = set(re.findall(r"\.entry (\w+)", ptx.value.decode()))
        expected = expected or entries
        if not entries or entries != expected or not all(e.startswith("pylora_") for e in entries):
            print(f"NVRTC, {target}: unexpected kernels: {sorted(entries ^ expected) or entries}")
            return 1
        print(f"NVRTC compiled {len(entries)} kernels for {target}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("library").add_argument("path", type=Path)
    nvrtc = parts.add_parser("nvrtc")
    nvrtc.add_argument("path", type=Path)
    nvrtc.add_argument("--library", help="the path of libnvrtc.so")
    arguments = parser.parse_args()
    if arguments.part == "library":
        return check_library(arguments.path)
    return check_nvrtc(arguments.path, load_nvrtc(arguments.library))


if __name__ == "__main__":
    raise SystemExit(main())
