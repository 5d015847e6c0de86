"""Keeps what hypothesis writes out of the current directory, which may be another's or read-only.

Hypothesis stores nothing of a run here (database=None), but it caches what it found out about
source files and Unicode in a folder `.hypothesis` where the process was started. While the kit
runs that folder is a temporary one, removed when the process ends; afterwards it is the caller's
again.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from pylora.extras import need


@cache
def _folder() -> str:
    """One for the process."""
    folder = tempfile.mkdtemp(prefix="pylora-conformance-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def elsewhere() -> Iterator[None]:
    """While the block runs hypothesis writes to a temporary folder."""
    configuration = need("hypothesis.configuration")
    before = getattr(configuration, "__hypothesis_home_directory", None)
    configuration.set_hypothesis_home_dir(_folder())
    try:
        yield
    finally:
        configuration.set_hypothesis_home_dir(before)
