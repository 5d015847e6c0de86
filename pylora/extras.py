"""Optional packages, imported when first needed, with an error that says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from pylora.errors import MissingExtraError

EXTRAS: dict[str, str] = {
    "gguf": "gguf",
    "tokenizers": "text",
    "jinja2": "text",
    "typer": "cli",
    "rich": "cli",
    "matplotlib": "plot",
    "hypothesis": "conformance",
    "ml_dtypes": "conformance",
    "pytest": "test",
    "pyarrow": "parquet",
}


def need(module: str) -> Any:
    """Imports `module` or raises MissingExtraError naming the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = EXTRAS[module.split(".")[0]]
        raise MissingExtraError(
            f"this needs the package {module.split('.')[0]!r} ({error}); "
            f"install it with: pip install 'pylora[{extra}]'"
        ) from error
