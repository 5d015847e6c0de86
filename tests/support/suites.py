"""A suite, written once for all tests of a process, and a run of it against an engine."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from fake_engine import served

from pylora.conformance.engines.book import Book
from pylora.conformance.engines.loading import loading
from pylora.conformance.engines.process import Server
from pylora.conformance.engines.run import Finding, Run
from pylora.conformance.suite.write import write_suite

_FOLDER = tempfile.TemporaryDirectory(prefix="pylora-suite-")


@functools.cache
def book() -> Book:
    """The suite of one family, seed 0."""
    folder = Path(_FOLDER.name) / "suite"
    write_suite(folder, ["llama"], 0, lambda text: None)
    return Book(folder)


def outcome(
    kind: Any, only: tuple[str, ...] = (), base: str = "llama", precision: str = "fp32"
) -> list[Finding]:
    """What the suite finds in an engine, a class of fake_engine."""
    engine = kind(Path(book().path(f"bases/{base}")))
    with served(engine) as url, Server(url, None, None, 20, 20) as server:
        return Run(book(), loading("vllm", server, None), precision, only=only).all([base])


def found(findings: list[Finding], test: str) -> Any:
    """The verdict of one test."""
    (one,) = (f.verdict for f in findings if f.test == test)
    return one
