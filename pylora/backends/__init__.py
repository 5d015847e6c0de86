"""Which backend computes: chosen by an argument, by `use(name)`, or by PYLORA_BACKEND.

Backends are imported when first asked for. Without a choice it is "c" where its extension is
built, else "numpy".
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from pylora.errors import BackendError

if TYPE_CHECKING:
    from pylora.backends.protocol import Backend

ENV = "PYLORA_BACKEND"

_CLASSES = {
    "c": ("pylora.backends.c", "CBackend"),
    "numpy": ("pylora.backends.numpy", "NumpyBackend"),
}
_loaded: dict[str, Backend] = {}
_chosen: Backend | None = None


class _NotBuilt(BackendError):
    """The backend's module cannot be imported in this installation."""


def _load(name: str) -> Backend:
    """The one instance of a backend. BackendError if unknown or not importable here."""
    if name not in _CLASSES:
        raise BackendError(f"there is no backend {name!r}; choose one of {', '.join(_CLASSES)}")
    if name not in _loaded:
        module, cls = _CLASSES[name]
        try:
            _loaded[name] = getattr(importlib.import_module(module), cls)()
        except ImportError as error:
            raise _NotBuilt(
                f"the backend {name!r} is not available in this installation ({error}); "
                "reinstall pylora with a C compiler present, or choose another backend"
            ) from error
    return _loaded[name]


def get(backend: str | Backend | None = None) -> Backend:
    """The backend of that name, the backend given, or (None) the one in use.

    In use is: the last `use(...)`, else the environment variable PYLORA_BACKEND, else "c" where it
    is built, else "numpy". Raises BackendError for a name that is unknown or not available.
    """
    if backend is not None:
        return _load(backend) if isinstance(backend, str) else backend
    if _chosen is not None:
        return _chosen
    if os.environ.get(ENV):
        return _load(os.environ[ENV])
    return _load(available()[0])


def use(backend: str | Backend | None) -> None:
    """Makes a backend the default of this process from now on; None forgets the choice.

    Models keep the backend they were built with.
    """
    global _chosen
    _chosen = None if backend is None else get(backend)


def available() -> tuple[str, ...]:
    """Names of the backends that can be used here, the preferred one first."""
    names = []
    for name in _CLASSES:
        try:
            _load(name)
        except _NotBuilt:  # any other failure is the user's to know
            continue
        names.append(name)
    return tuple(names)
