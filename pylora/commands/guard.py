"""What a user can mend becomes one sentence on stderr and an exit code (those of cli.py)."""

from __future__ import annotations

import errno
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, ParamSpec, TypeVar

from pylora.commands.signals import interrupted_import
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
            if isinstance(error, ImportError):  # it may be the import that a signal ended
                interrupted_import()
            stop(str(error), 1)
        except KeyboardInterrupt as error:
            stop(str(error) or "interrupted", getattr(error, "code", 130))
        except BrokenPipeError:
            raise
        except OSError as error:  # no such file, no permission, disk full
            stop(sentence(error), 1)
        except MemoryError:
            stop("there is not enough memory for this model and these settings", 1)

    return guarded


@contextmanager
def unfinished(what: str) -> Iterator[None]:
    """If the block is interrupted, the sentence about it goes on with `what`."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.args = (f"{error or 'interrupted'}; {what}",)
        raise


def sentence(error: OSError) -> str:
    """What the system says, and of which file."""
    named = error.filename is not None and error.strerror
    place = str(error.filename)
    if place.startswith(os.path.join(tempfile.gettempdir(), tempfile.gettempprefix())):
        place = f"the folder for temporary files, {tempfile.gettempdir()}"
    said = f"{place}: {error.strerror}" if named else error.strerror or str(error)
    return said + (": free some space, or write elsewhere" if error.errno == errno.ENOSPC else "")


def warn(message: str) -> None:
    """A line on stderr about something that goes on, but that may not be what was meant."""
    _print(f"pylora: warning: {message}")


def note(message: str) -> None:
    """A line on stderr that is no complaint."""
    _print(f"pylora: {message}")


def stop(message: str, code: int) -> NoReturn:
    """Ends the verb with a sentence on stderr and this exit code."""
    _print(f"pylora: {message}")
    raise SystemExit(code) from None


def _print(line: str) -> None:
    if sys.stderr is not None:
        if sys.stdout is not None:
            sys.stdout.flush()  # what was printed before comes before it in a log, too
        print(line, file=sys.stderr, flush=True)
