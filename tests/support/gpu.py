"""The GPU's backends in tests: on a GPU where there is one, else over a stand-in for CuPy and the
CUDA library compiled for the host (tests/cuda). PYLORA_TEST_EMULATED=1 asks for those anyway.

`HostSide` lets a test that thinks in NumPy call a GPU's operations: float arrays go there and come
back; what is updated in place is written back.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pylora.types import LoRA, Projection, ProjectionGrad, Residue

HERE = Path(__file__).resolve().parents[1]  # tests/
BUILD = Path(os.environ.get("PYLORA_EMULATED") or HERE / "cuda" / "build")


def prepare(library: bool) -> None:
    """Puts the stand-in where there is no CuPy with a GPU, and builds the emulated library."""
    if os.environ.get("PYLORA_TEST_EMULATED") != "1":
        try:
            import cupy

            if cupy.cuda.runtime.getDeviceCount() > 0:
                return
        except Exception:  # none, or none that works
            for name in [n for n in sys.modules if n.split(".")[0] == "cupy"]:
                del sys.modules[name]
    sys.path.insert(0, str(HERE / "cupy_standin"))
    if not library:
        return
    make = ["make", "-s", "-j2", "-C", str(HERE / "cuda"), "emulated", f"BUILD={BUILD.resolve()}"]
    subprocess.run(make, check=True)
    os.environ.setdefault("PYLORA_CUDA_LIBRARY", str(BUILD / "libpylora_cuda_emulated.so"))
    os.environ.setdefault("PYLORA_CUBLASLT", str(BUILD / "libcublasLt_emulated.so"))
    import cupy

    cupy.cuda.emulated = ctypes.CDLL(str(BUILD / "libcudart_emulated.so"), mode=ctypes.RTLD_GLOBAL)
    cupy.cuda.kernels = ctypes.CDLL(str(BUILD / "libpylora_kernels_emulated.so"))


def on_gpu(ops: Any) -> bool:
    return ops.name in ("cuda", "cupy")


class HostSide:
    """A GPU's backend whose operations take NumPy arrays and give them."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if not callable(value) or name in ("computes", "activation_dtype", "llama", "to_numpy"):
            return value

        def call(*args: Any, **kw: Any) -> Any:
            there: list[tuple[np.ndarray, Any]] = []
            moved = [self._there(a, there) for a in args]
            result = value(*moved, **{k: self._there(a, there) for k, a in kw.items()})
            if name in ("adamw_step", "merge_in_place"):
                for host, device in there:
                    if host.flags.writeable:
                        host[...] = self._ops.to_numpy(device)
            return self._here(result)

        return call

    def _there(self, a: Any, seen: list[tuple[np.ndarray, Any]]) -> Any:
        if isinstance(a, np.ndarray) and (a.dtype.kind in "fcV"):
            device = self._ops.place(a)
            seen.append((a, device))
            return device
        if isinstance(a, (LoRA, Projection, ProjectionGrad)):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
            return type(a)(**{k: self._there(v, seen) for k, v in fields.items()})
        if isinstance(a, (list, tuple)):
            return type(a)(self._there(x, seen) for x in a)
        return a

    def _here(self, a: Any) -> Any:
        if isinstance(a, self._ops.xp.ndarray):
            return self._ops.to_numpy(a)
        if isinstance(a, (list, tuple)):
            return type(a)(self._here(x) for x in a)
        if isinstance(a, Residue):
            return Residue(self._here(a.position), self._here(a.bits), self._here(a.norm))
        return a


def host_side(ops: Any) -> Any:
    """`ops` for a test that calls operations with NumPy arrays."""
    return HostSide(ops) if on_gpu(ops) else ops
