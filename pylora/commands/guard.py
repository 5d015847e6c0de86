"""What a user can mend becomes one sentence on stderr and an exit code (those of cli.py)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from pylora.errors import PyloraError

P = ParamSpec("P")
T = TypeVar("T")


def verb(function: Callable[P, T]) -> Callable[P, T]:
    """Wraps a command: what a user can mend becomes one sentence on stderr and exit code 1."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except PyloraError as error:
            _stop(str(error), 1)
        except KeyboardInterrupt:
            _stop("interrupted", 130)
        except BrokenPipeError:
            raise
        except OSError as error:  # no such file, no permission, disk full
            named = error.filename is not None and error.strerror
            _stop(f"{error.filename}: {error.strerror}" if named else str(error), 1)
        except MemoryError:
            _stop("there is not enough memory for this model and these settings", 1)

    return guarded


def _stop(message: str, code: int) -> NoReturn:
    print(f"pylora: {message}", file=sys.stderr)
    raise SystemExit(code) from None
