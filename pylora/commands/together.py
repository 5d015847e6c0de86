"""A command in several processes, started by mpiexec: one of them speaks, and they end together."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import ParamSpec, TypeVar

from pylora.commands.guard import sentence
from pylora.errors import PyloraError
from pylora.training.launched import launched

P = ParamSpec("P")
T = TypeVar("T")


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Wraps a command that several processes may run, started by mpiexec; one, as a rule.

    Of several, rank 0 alone writes to the screen, and each uses its part of the host's processors,
    unless PYLORA_NUM_THREADS says how many. An error on all of them is said once; one on some ends
    them all.
    """

    @functools.wraps(function)
    def in_step(*args: P.args, **kwargs: P.kwargs) -> T:
        if launched() == 1:
            return function(*args, **kwargs)
        from pylora.training.mpi import Mpi, world

        ranks = world()
        assert isinstance(ranks, Mpi)
        os.environ.setdefault("PYLORA_NUM_THREADS", str(ranks.threads()))
        out, err = (sys.stdout, sys.stderr) if ranks.rank == 0 else (None, None)
        say = functools.partial(print, file=sys.stderr, flush=True)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                return function(*args, **kwargs)
        except KeyboardInterrupt as error:
            ranks.ended(f"pylora: {error or 'interrupted'}", say)
            raise SystemExit(getattr(error, "code", 130)) from None
        except (PyloraError, OSError, MemoryError) as error:
            said = sentence(error) if isinstance(error, OSError) else str(error)
            ranks.ended(f"pylora: {said or 'there is not enough memory'}", say)
            raise SystemExit(1) from None
        except Exception:
            ranks.ended(traceback.format_exc(), say)
            raise SystemExit(1) from None

    return in_step


def again(args: list[str]) -> list[str]:
    """The words that start this command in as many processes."""
    n = launched()
    return [*(["mpiexec", "-n", str(n)] if n > 1 else []), *args]
