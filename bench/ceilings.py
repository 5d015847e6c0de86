"""What this machine can do at most, with the threads of the run (ceilings.c)."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).resolve().parent / "ceilings.c"
LONGEST = 3.0  # seconds for the repetitions of one of them; a busy machine takes many times as long
I64, PTR = ctypes.c_int64, ctypes.c_void_p


def library(folder: str) -> ctypes.CDLL:
    out = str(Path(folder) / "ceilings.so")
    cc = os.environ.get("CC", "cc").split()
    flags = ["-std=gnu11", "-O2", "-march=native", "-ffp-contract=fast", "-fopenmp"]
    subprocess.run([*cc, *flags, "-shared", "-fPIC", str(SOURCE), "-o", out], check=True)
    return ctypes.CDLL(out)


def array(megabytes: int) -> tuple[np.ndarray, Any]:
    """Aligned memory whose pages are there, and its address."""
    raw = np.ones((megabytes << 20) // 4 + 16, np.float32)
    address = raw.__array_interface__["data"][0]
    return raw, PTR(address + -address % 64)


def measure(threads: int, reps: int = 7, megabytes: int = 512) -> dict[str, dict[str, Any]]:
    """{name: {"unit", "samples", "best"}}, in 1e9 operations or bytes a second."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        c = library(folder)
        names = ("fp32_fma", "bf16_dot", "int8_dot", "int16_dot", "amx", "read_bytes", "copy_bytes")
        for name in (*names, "change_bytes"):
            getattr(c, name).restype = ctypes.c_double
        n = 2_000_000
        _, p = keep_p = array(megabytes)
        _, q = keep_q = array(megabytes)
        size = I64(megabytes << 20)
        tasks: list[tuple[str, str, Callable[[], float]]] = [
            ("fp32 FMA", "GFLOP/s", lambda: c.fp32_fma(I64(n))),
            ("bf16 dot", "GFLOP/s", lambda: c.bf16_dot(I64(n))),
            ("int8 dot", "GOP/s", lambda: c.int8_dot(I64(n))),
            ("int16 dot", "GOP/s", lambda: c.int16_dot(I64(n))),
            ("AMX bf16", "GFLOP/s", lambda: c.amx(I64(n // 10), 0)),
            ("AMX int8", "GOP/s", lambda: c.amx(I64(n // 10), 1)),
            ("memory read", "GB/s", lambda: c.read_bytes(p, size)),
            ("memory copy", "GB/s", lambda: c.copy_bytes(q, p, size)),
            ("memory change in place", "GB/s", lambda: c.change_bytes(p, size)),
        ]
        for name, unit, task in tasks:
            if not task():
                continue  # no such instruction here
            samples: list[float] = []
            until = time.monotonic() + LONGEST
            while len(samples) < reps and (not samples or time.monotonic() < until):
                began = time.perf_counter()
                work = task()
                samples.append(work / (time.perf_counter() - began) / 1e9)
            found[name] = {"unit": unit, "samples": samples, "best": max(samples)}
        del keep_p, keep_q
    return found


if __name__ == "__main__":
    for name, row in measure(len(os.sched_getaffinity(0))).items():
        print(f"{name:24} {row['best']:8.1f} {row['unit']}  (lowest {min(row['samples']):.1f})")
