"""The one exception hierarchy. Each message says what was wrong, where, and what to do."""

from __future__ import annotations


class PyloraError(Exception):
    """Base of every error that pylora raises on purpose."""


class ShapeError(PyloraError, ValueError):
    """Array shapes do not fit each other or the model."""


class DtypeError(PyloraError, TypeError):
    """An array has a dtype that the operation or backend does not take."""


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
