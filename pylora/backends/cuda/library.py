"""Finding and loading libpylora_cuda, and cuBLASLt for it. Nothing happens at import.

Declarations come from `pylora.backends._cuda_abi`, which the build makes from pylora_cuda.h. The
library is looked for at PYLORA_CUDA_LIBRARY, else in pylora/backends, where the build puts it if
there was an nvcc. cuBLASLt is looked for at PYLORA_CUBLASLT, in NVIDIA's PyPI wheels and in a CUDA
toolkit; else the library itself takes one that is loaded already, or that the system finds.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pylora.errors import BackendError, RangeError

ABI = 2
NAMES = ("libpylora_cuda.so", "pylora_cuda.dll")


class NoLibrary(BackendError):
    """This installation has no CUDA library."""


def library_path() -> Path | None:
    """Where the compiled library is, or None where there is none. A path in PYLORA_CUDA_LIBRARY is
    taken as it is."""
    given = os.environ.get("PYLORA_CUDA_LIBRARY")
    if given:
        return Path(given)
    here = Path(__file__).resolve().parents[1]  # pylora/backends
    return next((here / name for name in NAMES if (here / name).exists()), None)


def _wheels() -> Iterator[Path]:
    """Folders of NVIDIA's wheels that may hold cuBLASLt; no import of any."""
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        return
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for part in ("cu13", "cublas"):
            yield Path(root) / part / "lib"


def cublaslt_path() -> Path | None:
    """A libcublasLt.so in the wheels or a toolkit; None: the library looks for itself."""
    given = os.environ.get("PYLORA_CUBLASLT")
    if given:
        return Path(given)
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for folder in (*_wheels(), Path(toolkit) / "lib64"):
        found = sorted(folder.glob("libcublasLt.so*"))
        if found:
            return found[0]
    return None


class Library:
    """The loaded library: `ffi`, `lib`, and its errors as exceptions."""

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise NoLibrary(
                "this installation has no CUDA library (libpylora_cuda); reinstall pylora with "
                "nvcc present (PYLORA_CUDA=on makes a missing one an error)"
            )
        try:
            from pylora.backends._cuda_abi import ffi
        except ImportError as error:
            raise NoLibrary(
                f"pylora.backends._cuda_abi was not built ({error}); reinstall"
            ) from error
        try:
            self.lib: Any = ffi.dlopen(str(path))
        except OSError as error:
            raise NoLibrary(f"{path} cannot be loaded: {error}") from error
        self.path, self.ffi = path, ffi
        found = int(self.lib.pylora_cuda_abi_version())
        if found != ABI:
            raise NoLibrary(
                f"{path} is of ABI {found} and this pylora needs {ABI}; reinstall pylora"
            )

    def error(self) -> str:
        """The sentence of this thread's last failure of the device."""
        return str(self.ffi.string(self.lib.pylora_cuda_error()).decode(errors="replace"))

    def check(self, status: int, op: str) -> None:
        if status == 0:
            return
        lib = self.lib
        if status == lib.PYLORA_E_INDEX:
            raise RangeError(f"{op}: a token id, label, position or row is out of range")
        text = self.error() if status == lib.PYLORA_E_DEVICE else _TEXT.get(status, "")
        raise BackendError(f"{op}: {text or f'status {status}'}")

    def devices(self) -> int:
        """How many GPUs there are. 0 without a driver: then `error()` says why."""
        count = self.ffi.new("int32_t *")
        self.check(self.lib.pylora_cuda_device_count(count), "device_count")
        return int(count[0])

    def device(self, number: int) -> dict[str, Any]:
        """What a GPU is: see pylora_cuda_device in csrc/cuda/pylora_cuda.h."""
        info = self.ffi.new("pylora_cuda_device *")
        self.check(self.lib.pylora_cuda_device_info(number, info), "device_info")
        return {
            "name": self.ffi.string(info.name).decode(errors="replace"),
            "compute capability": f"{info.major}.{info.minor}",
            "driver": _version(info.driver),
            "runtime": _version(info.runtime),
            "total bytes": int(info.total_bytes),
            "free bytes": int(info.free_bytes),
        }

    def open(self, number: int) -> Any:
        """The context of a GPU, with cuBLASLt."""
        path, out = cublaslt_path(), self.ffi.new("pylora_cuda **")
        name = self.ffi.NULL if path is None else str(path).encode()
        self.check(self.lib.pylora_cuda_open(number, name, out), "open")
        return out[0]


# pylora_status_text is the CPU library's; these are the same statuses.
_TEXT = {
    1: "a required pointer is NULL", 2: "shapes do not fit each other",
    3: "the workspace is too small", 5: "an argument is out of its domain",
    6: "this build or device cannot do it", 7: "a weight is not one that pack made",
}  # fmt: skip


def _version(n: int) -> str:
    return f"{n // 1000}.{n % 1000 // 10}"


_lock = threading.Lock()
_library: list[Library] = []


def library() -> Library:
    """The library, loaded once. NoLibrary where there is none that can be used."""
    with _lock:
        if not _library:
            _library.append(Library())
        return _library[0]
