"""The kit as a command of its own, for those who have the kit alone: standard library's argparse.

    python -m pylora.conformance mypkg.mylora:Implementation

Exit codes: 0 every law that could be asked was kept; 1 a law failed or broke; 2 nothing was tested,
since the command line, the implementation or a file of the report is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from pylora.errors import PyloraError


def parser(name: str) -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(name, description="Test an implementation of LoRA.")
    made.add_argument("implementation", nargs="?", metavar="PACKAGE.MODULE:CLASS")
    made.add_argument("--profile", metavar="NAME", help="quick (the default) or nightly")
    made.add_argument("--law", action="append", default=[], metavar="ID", help="may be repeated")
    made.add_argument("--examples", type=int, metavar="N", help="per law, in place of a profile")
    made.add_argument("--seed", type=int, default=0, metavar="N")
    made.add_argument("--junit", type=Path, metavar="FILE", help="write JUnit's XML too")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON too")
    made.add_argument("--list", action="store_true", help="show the laws and stop")
    made.add_argument("--mutants", action="store_true", help="kill the kit's own mutants and stop")
    return made


def main(arguments: Sequence[str] | None = None, name: str = "pylora-conformance") -> int:
    """Runs the command and returns its exit code."""
    lines = parser(name)
    given = lines.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # what an implementation says may fit no encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    what = [bool(given.implementation), given.list, given.mutants]
    if sum(what) != 1:
        lines.error("give one of: an implementation, --list, --mutants")
    if given.profile and given.examples is not None:
        lines.error("a profile is a number of examples: give --profile or --examples")
    try:
        return _carry_out(given)
    except PyloraError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def _carry_out(given: argparse.Namespace) -> int:
    from pylora.conformance.running import command

    def say(text: str) -> None:
        print(text, flush=True)

    if given.list:
        say(command.listing(given.law).removesuffix("\n"))
        return 0
    if given.mutants:
        from pylora.conformance.mutants.hunt import hunt

        return 0 if hunt(say, seed=given.seed) else 1
    kept = command.test(
        given.implementation,
        given.profile or "quick",
        given.law,
        given.examples,
        given.seed,
        say,
        given.junit,
        given.json,
    )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(name="python -m pylora.conformance"))
