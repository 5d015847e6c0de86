"""`pylora doctor`: which extras are there and what each would bring; what of a GPU is there, step
by step, and what to do about what is not.

Each step is looked at by itself: the extras, the compiled library, its version, the driver and its
devices, cuBLASLt, CuPy; then what computes. Nothing is changed, and nothing but the GPU's parts is
loaded. A Step of state `optional` is an extra that is not there, which is no fault.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylora.extras import BRINGS, DISTRIBUTION, install, installed

OK, MISSING, OPTIONAL = "ok", "missing", "optional"
NOTE = Path(__file__).parents[1] / "backends" / "_cuda_note.txt"  # what the build says


@dataclass(frozen=True)
class Step:
    """One thing that a GPU needs."""

    what: str
    state: str  # "ok", "missing" or "optional"
    text: str
    advice: str = ""  # what to do about a missing one


def examine() -> list[Step]:
    """All steps, the last one saying what computes here."""
    steps, library = _library()
    steps = [*_extras(), *steps]
    steps += _driver(library)
    steps.append(_cublaslt())
    steps += _cupy()
    return [*steps, *_computes()]


def _extras() -> list[Step]:
    steps = []
    for extra, brings in BRINGS.items():
        here, missing = installed(extra)
        what = f"extra {extra}" if extra else "plain install"
        if not missing:
            steps.append(Step(what, OK, f"{brings}: {', '.join(here)}"))
            continue
        text = f"{brings}; not installed: {', '.join(missing)}"
        text += f"; here: {', '.join(here)}" if here else ""
        steps.append(Step(what, OPTIONAL if extra else MISSING, text, install(extra)))
    return steps


def _library() -> tuple[list[Step], Any]:
    from pylora.backends.cuda.library import ABI, Library, NoLibrary, library_path
    from pylora.errors import BackendError

    built = NOTE.read_text(encoding="utf-8").strip() if NOTE.is_file() else "no note of the build"
    path = library_path()
    if path is None:
        advice = (
            "PYLORA_CUDA=on pip install --force-reinstall --no-deps --no-binary :all: "
            f"{DISTRIBUTION} (or `.` in a clone); that needs nvcc, of a CUDA toolkit"
        )
        return [Step("CUDA library", MISSING, built, advice)], None
    try:
        library = Library()
    except (NoLibrary, BackendError) as error:
        return [Step("CUDA library", MISSING, f"{path}: {error}", "reinstall pylora")], None
    return [Step("CUDA library", OK, f"{path}, ABI {ABI}; {built}")], library


def _driver(library: Any) -> list[Step]:
    advice = "install NVIDIA's driver; inside a container, start it with --gpus all"
    if library is None:
        return [Step("GPU", MISSING, "not looked for: that is the CUDA library's part")]
    try:
        count = library.devices()
        if count == 0:
            return [Step("GPU", MISSING, library.error() or "there is none", advice)]
        return [_device(i, library.device(i)) for i in range(count)]
    except Exception as error:  # whatever a driver may say
        return [Step("GPU", MISSING, str(error), advice)]


def _device(number: int, d: dict[str, Any]) -> Step:
    text = (
        f"{d['name']}, compute capability {d['compute capability']}, driver for CUDA "
        f"{d['driver']}, {d['free bytes'] / 1e9:.1f} of {d['total bytes'] / 1e9:.1f} GB free"
    )
    if float(d["compute capability"]) < 8.0:
        return Step(f"GPU {number}", MISSING, text, "pylora needs compute capability 8.0 (A100)")
    return Step(f"GPU {number}", OK, text)


def _cublaslt() -> Step:
    from pylora.backends.cuda.library import cublaslt_path

    path = cublaslt_path()
    if path is not None and not path.exists():
        return Step("cuBLASLt", MISSING, f"{path} does not exist", "set PYLORA_CUBLASLT right")
    if path is not None:
        return Step("cuBLASLt", OK, str(path))
    return Step(
        "cuBLASLt",
        MISSING,
        "in no PyPI wheel and no CUDA toolkit here; one that is loaded already is used",
        install("cuda"),
    )


def _cupy() -> list[Step]:
    if importlib.util.find_spec("cupy") is None:
        return [Step("CuPy", MISSING, "not installed", install("cuda"))]
    try:
        import cupy
    except Exception as error:  # a broken installation may raise anything
        return [Step("CuPy", MISSING, f"cannot be imported: {error}", "reinstall cupy-cuda13x")]
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        return [Step("CuPy", MISSING, f"{cupy.__version__}, but it finds no GPU: {error}")]
    try:  # a kernel that CuPy compiles: without NVRTC and CUDA's headers it computes nothing
        float((cupy.zeros(2) + 1).sum())
    except Exception as error:
        text = f"{cupy.__version__}, but it cannot compile or run a kernel: {error}"
        return [Step("CuPy", MISSING, text, "pip install 'cupy-cuda13x[ctk]'")]
    from pylora.backends.cupy.kernels import Kernels

    steps, kernels = [Step("CuPy", OK, f"{cupy.__version__}, {count} GPUs")], Kernels(cupy)
    if kernels.ready:
        return [*steps, Step("CuPy's compiler", OK, "pylora's kernels compile: cupy uses them")]
    text = f"pylora's kernels do not compile ({kernels.failure}); cupy runs the reference alone"
    return [*steps, Step("CuPy's compiler", MISSING, text)]


def _computes() -> list[Step]:
    from pylora import backends
    from pylora.errors import PyloraError

    names = backends.available()
    steps = []
    for name in ("cuda", "cupy"):
        if name in names:
            steps.append(Step(f"backend {name}", OK, f"available: --backend {name}"))
        else:
            try:
                backends.exactly(name)
                text = "available"
            except PyloraError as error:
                text = str(error)
            steps.append(Step(f"backend {name}", MISSING, text))
    try:
        now = backends.get()
    except PyloraError as error:
        return [*steps, Step("computes now", MISSING, str(error))]
    text = f"{now.name}; a GPU computes when asked: --backend cuda, PYLORA_BACKEND, pylora.use"
    return [*steps, Step("computes now", OK, text)]
