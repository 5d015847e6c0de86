"""Optional packages, imported when first needed, with an error that says what to install.

What pip installs is called DISTRIBUTION: on PyPI the name `pylora` is another project's, so every
sentence that tells what to type takes it from here. The modules of the plain install are listed
too: an embedder may leave them out (--no-deps), and then needs one in the end.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from pylora.errors import MissingExtraError

DISTRIBUTION = "pylora-engine"

# The module that is imported -> the extra that brings it; "": the plain install does.
EXTRAS: dict[str, str] = {
    "tokenizers": "",
    "jinja2": "",
    "typer": "",
    "rich": "",
    "matplotlib": "plot",
    "gguf": "iq",
    "cupy": "cuda",
    "hypothesis": "conformance",
    "ml_dtypes": "conformance",
    "pytest": "test",
    "pyarrow": "parquet",
    "yaml": "recipes",
    "mpi4py": "mpi",
    "wandb": "wandb",
    "trackio": "trackio",
    "starlette": "serve",
    "uvicorn": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
}
# What each extra is for, as `pylora doctor` says it.
BRINGS: dict[str, str] = {
    "": "the command, tokenizers and chat templates",
    "plot": "pictures of the loss and of adapters",
    "parquet": "records for training in Parquet files",
    "recipes": "settings of a training run in a YAML file (JSON needs no package)",
    "mpi": "training in several processes, on one machine or many (mpiexec)",
    "wandb": "training's figures on Weights & Biases (--report-to wandb)",
    "trackio": "training's figures in Trackio (--report-to trackio)",
    "iq": "base models in GGUF's types IQ1, IQ2 and IQ3",
    "cuda": "the backends cuda and cupy, on an NVIDIA GPU",
    "serve": "the HTTP server of `pylora serve`",
    "conformance": "testing an implementation of LoRA, yours or this one",
    "test": "pylora's own tests",
}
# Where the module's name is not the package's.
_PACKAGES = {"cupy": "cupy-cuda13x", "prometheus_client": "prometheus-client", "yaml": "pyyaml"}


def install(extra: str = "") -> str:
    """The command that installs pylora with an extra: `pip install 'pylora-engine[plot]'`."""
    return f"pip install '{DISTRIBUTION}[{extra}]'" if extra else f"pip install {DISTRIBUTION}"


def need(module: str) -> Any:
    """Imports `module` or raises MissingExtraError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise MissingExtraError(
            f"this needs the package {name!r} ({error}); install it with: {install(EXTRAS[name])}"
        ) from error


def installed(extra: str) -> tuple[list[str], list[str]]:
    """The packages of an extra that are here, with their versions, and the names of those that are
    not. Nothing is imported."""
    here, missing = [], []
    for module in (m for m, e in EXTRAS.items() if e == extra):
        package = _PACKAGES.get(module, module)
        if importlib.util.find_spec(module) is None:
            missing.append(package)
            continue
        try:
            here.append(f"{module} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # by another name, or not by pip
            here.append(module)
    return here, missing
