"""Which backend computes: chosen by an argument, by `use(name)`, or by PYLORA_BACKEND.

Backends are imported when first asked for. Without a choice it is "c" where its extension is
built, else "numpy": a GPU computes when it is asked to, since a model that fits into the host's
memory need not fit into a GPU's, and since results there have other last bits.

"cuda" (or "gpu") is the compiled CUDA library; where this installation has none, CuPy's backend
takes its place, with a warning. "auto" is the first that can be used of "cuda", "cupy" and the
host's: the same program on machines with a GPU and without; `.name` says which it is.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pylora.errors import BackendError, expect
from pylora.extras import install

if TYPE_CHECKING:
    from pylora.ops.protocol import Backend

ENV = "PYLORA_BACKEND"


def _open_c() -> Backend:
    from pylora.backends.c import CBackend

    return CBackend()


def _open_numpy() -> Backend:
    from pylora.backends.numpy import NumpyBackend

    return NumpyBackend()


def _open_cuda() -> Backend:
    from pylora.backends.cuda import CudaBackend

    return CudaBackend()


def _open_cupy() -> Backend:
    from pylora.backends.cupy import CupyBackend

    return CupyBackend()


# Written out, so that a type checker holds each to the protocol.
_OPEN: dict[str, Callable[[], Backend]] = {
    "c": _open_c,
    "numpy": _open_numpy,
    "cuda": _open_cuda,
    "cupy": _open_cupy,
}
_GPU = ("cuda", "cupy")
_ADVICE = {
    "c": "reinstall pylora with a C compiler present, or choose another backend",
    "cuda": "`pylora doctor` says what is missing; without a GPU choose c",
    "cupy": f"install CuPy ({install('cuda')}); without a GPU choose c",
}
_loaded: dict[str, Backend] = {}
_chosen: Backend | None = None


class _NotBuilt(BackendError):
    """The backend's module cannot be imported in this installation."""


def _load(name: str) -> Backend:
    """The one instance of a backend. BackendError if unknown or not importable here."""
    if name == "auto":
        return _best()
    name = "cuda" if name == "gpu" else name
    if name == "cuda" and name not in _loaded:
        return _cuda_or_cupy()
    return exactly(name)


def _cuda_or_cupy() -> Backend:
    """The CUDA backend; or CuPy's where only the library is missing, which a warning says."""
    from pylora.backends.cuda.library import NoLibrary

    try:
        return exactly("cuda")
    except NoLibrary as missing:
        try:
            instead = exactly("cupy")
        except BackendError:
            raise missing from None
        warnings.warn(
            f"the backend 'cuda' is not available ({missing}); 'cupy' computes in its place, more "
            "slowly",
            RuntimeWarning,
            stacklevel=4,
        )
        return instead


def _best() -> Backend:
    """The first of the GPU's backends that can be used here, else the host's."""
    for name in _GPU if importlib.util.find_spec("cupy") else ():
        try:
            return exactly(name)
        except BackendError:  # `pylora doctor` says why
            continue
    return host()


def exactly(name: str) -> Backend:
    """The backend of that name and no other."""
    if name not in _OPEN:
        raise BackendError(f"there is no backend {name!r}; choose one of {', '.join(_OPEN)}, auto")
    if name not in _loaded:
        try:
            _loaded[name] = _OPEN[name]()
        except ImportError as error:
            raise _NotBuilt(
                f"the backend {name!r} is not available in this installation ({error}); "
                f"{_ADVICE.get(name, 'reinstall pylora')}"
            ) from error
    return _loaded[name]


def get(backend: str | Backend | None = None) -> Backend:
    """The backend of that name, the backend given, or (None) the one in use.

    In use is: the last `use(...)`, else the environment variable PYLORA_BACKEND, else "c" where it
    is built, else "numpy". Raises BackendError for a name that is unknown or not available.
    """
    if backend is not None:
        expect("backend", backend, "backend=, or pylora.use,")
        return _load(backend) if isinstance(backend, str) else backend
    if _chosen is not None:
        return _chosen
    if os.environ.get(ENV):
        return _load(os.environ[ENV])
    return host()


def host() -> Backend:
    """The backend of the host's processor: "c" where it is built, else "numpy"."""
    try:
        return exactly("c")
    except _NotBuilt:
        return exactly("numpy")


def use(backend: str | Backend | None) -> None:
    """Makes a backend the default of this process from now on; None forgets the choice.

    Models keep the backend they were built with.
    """
    global _chosen
    _chosen = None if backend is None else get(backend)


def available() -> tuple[str, ...]:
    """Names of the backends that can be used here, the preferred one of the host first.

    Those of a GPU are tried only where CuPy is installed.
    """
    names = []
    for name in _OPEN:
        try:
            if name not in _GPU or name in _loaded or importlib.util.find_spec("cupy"):
                exactly(name)
                names.append(name)
        except _NotBuilt:  # any other failure of a host's backend is the user's to know
            continue
        except BackendError:
            if name not in _GPU:
                raise
    return tuple(names)
