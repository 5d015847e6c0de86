"""The entry point of the command `pylora`: sets up, runs a verb, and turns errors into sentences.

Exit codes: 0 done; 1 something was wrong with the input or the machine, or a check failed (one
sentence on stderr); 2 the command line was wrong: an unknown verb or option, a value that cannot
be read, options that contradict each other; 128 + n a signal ended it, 130 for Ctrl-C. The verbs
are in this folder, and need typer, which --no-deps leaves out; without it this says so. Errors in
pylora itself keep their traceback: they are bugs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from signal import SIGINT

from pylora.commands.signals import Signals, Stopped, interrupted_import, silence
from pylora.errors import MissingExtraError
from pylora.extras import need


def main(args: Sequence[str] | None = None) -> int:
    """Runs `pylora args...` (default: the process's own arguments) and returns the exit code."""
    code = 1
    try:
        with Signals() as signals:
            code = _guarded(list(sys.argv[1:] if args is None else args), signals)
    except KeyboardInterrupt:  # between two lines of this file
        code = 130
    finally:
        if args is None:  # the process is about to end
            silence()
    return code


def _guarded(args: list[str], signals: Signals) -> int:
    try:
        return _run(args)
    except BrokenPipeError:  # such as `pylora plan ... | head`
        _forget_output()
        return 1
    except OSError as error:  # standard output: a full disk, a terminal that is gone
        _forget_output()
        _say(f"standard output cannot be written: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        return _stopped(signals)
    except Exception:
        if not signals.just_now:
            raise
        return _stopped(signals)  # an import that a signal ended may come out as any error


def _stopped(signals: Signals) -> int:
    stopped = Stopped(signals.number or SIGINT)
    _say(str(stopped))
    return stopped.code


def _run(args: list[str]) -> int:
    try:
        need("typer")
    except MissingExtraError as error:
        interrupted_import()
        _say(str(error))
        return 1
    _encoding()
    from pylora.commands import parse
    from pylora.commands.verbs import app

    try:
        code = parse.run(app, args)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    if sys.stdout is not None:
        sys.stdout.flush()
    return code


def _encoding() -> None:
    """The notation is beyond ASCII. A pipe or a file gets UTF-8 whatever the locale; a terminal
    that has another encoding gets what it can show (Console), and no error for the rest."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None or not hasattr(stream, "reconfigure"):
            continue
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="replace")


def _forget_output() -> None:
    """Whatever is still to be printed goes nowhere, so that ending the process is no error."""
    if sys.stdout is not None:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except (OSError, ValueError):
            sys.stdout = None


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"pylora: {text}", file=sys.stderr)
