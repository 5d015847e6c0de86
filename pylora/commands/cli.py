"""The entry point of the command `pylora`: sets up, runs a verb, and turns errors into sentences.

Exit codes: 0 done; 1 something was wrong with the input or the machine (one sentence on stderr);
2 the command line was wrong; 130 interrupted. The verbs are in this folder, and need
typer, which --no-deps leaves out; without it this says so. Errors in pylora itself keep their
traceback: they are bugs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pylora.errors import MissingExtraError
from pylora.extras import need


def main(args: Sequence[str] | None = None) -> int:
    """Runs `pylora args...` (default: the process's own arguments) and returns the exit code."""
    try:
        need("typer")
        need("rich")
    except MissingExtraError as error:
        print(f"pylora: {error}", file=sys.stderr)
        return 1
    for stream in (sys.stdout, sys.stderr):  # the notation is beyond ASCII, whatever the locale
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        from pylora.commands.verbs import app

        app(args=list(sys.argv[1:] if args is None else args), prog_name="pylora")
        sys.stdout.flush()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # such as `pylora plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
