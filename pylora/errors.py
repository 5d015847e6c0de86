"""The one exception hierarchy. Each message says what was wrong, where, and what to do."""

from __future__ import annotations

from typing import Any, NoReturn


class PyloraError(Exception):
    """Base of every error that pylora raises on purpose."""


class ShapeError(PyloraError, ValueError):
    """Array shapes do not fit each other or the model."""


class DtypeError(PyloraError, TypeError):
    """An array has a dtype that the operation or backend does not take."""


class WrongTypeError(PyloraError, TypeError):
    """Something of another kind was passed: a path where a model belongs, text where ids belong.

    The message says what was got, what is taken there, and what to pass.
    """


class RangeError(PyloraError, IndexError):
    """A token id, label, position or row number lies outside of what it indexes."""


class FileFormatError(PyloraError, ValueError):
    """A file is truncated, malformed or hostile. The message names the file and the tensor."""


class ConfigError(PyloraError, ValueError):
    """A configuration value is missing, out of range or contradicts another."""


class PlanError(PyloraError, ValueError):
    """An adapter does not fit the model: unknown target, missing, extra or misshapen tensor."""


class UnsupportedError(PyloraError, NotImplementedError):
    """A feature that changes the result and that pylora does not implement; never ignored."""


class DataError(PyloraError, ValueError):
    """A training or evaluation record cannot be used. The message names the file and line."""


class TrainingError(PyloraError, ArithmeticError):
    """Training left the finite numbers. The message names the step and the last good checkpoint."""


class BackendError(PyloraError, RuntimeError):
    """A backend is unknown, unavailable, or reported a failure."""


class MissingExtraError(PyloraError, ImportError):
    """An optional package is needed. The message says which extra to install."""


class FetchError(PyloraError, RuntimeError):
    """A download failed or did not hash to what is known."""


def describe(value: Any) -> str:
    """What a value is, in a few words of a sentence: "the text 'abc'", "a list of 3"."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, str):
        return f"the text {value[:60]!r}{'...' if len(value) > 60 else ''}"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.40}"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    name = type(value).__name__
    if hasattr(value, "__fspath__"):
        return f"the path {str(value)[:200]!r}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"a {name} of {len(value)}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of {value.dtype} {list(value.shape)}"
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"


def wrong_type(where: str, takes: str, got: Any, advice: str = "") -> NoReturn:
    """Raises the WrongTypeError "`where` takes `takes`, got `got`; `advice`"."""
    raise WrongTypeError(f"{where} takes {takes}, got {describe(got)}{advice and '; '}{advice}")
