"""Output that appears whole or not at all: written beside its place, flushed, then renamed.

Both context managers yield a path beside the target, in the same file system. Leaving the block
without an error puts the result in place; an error removes what was written and leaves the
target as it was. Locking against a second writer is not done here: the last one to finish wins.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pylora.errors import ConfigError, UnsupportedError


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to; it becomes `path` when the block ends, replacing an older file.

    The yielded name keeps the suffix of `path`, for writers that choose a format by it. A missing
    parent directory is made. Raises ConfigError if `path` is a directory.
    """
    target = Path(path)
    if target.is_dir():
        raise ConfigError(f"cannot write the file {target}: a directory of that name is there")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    try:
        yield beside
        _flush(beside)
        os.replace(beside, target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        _call_it(error, beside, target)
        raise
    _flush_directory(target.parent)


@contextmanager
def atomic_dir(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty directory to fill; it becomes `path` when the block ends.

    A directory that is already there is replaced if nothing in it would be lost, that is, if the
    new one has an entry for each of its entries, or if `replace` is true. Otherwise ConfigError
    names what would be lost, and nothing changes. Replacing takes two renames: a power cut between
    them leaves the older directory complete under a hidden name beside the new one.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ConfigError(f"cannot write the directory {target}: a file of that name is there")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(target)
    try:
        beside.mkdir()
        yield beside
        for entry in beside.rglob("*"):
            _flush(entry) if entry.is_file() else _flush_directory(entry)
        _flush_directory(beside)
        if target.exists():
            _exchange(beside, target, replace)
        else:
            os.replace(beside, target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _call_it(error, beside, target)
        raise
    _flush_directory(target.parent)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")


def _call_it(error: BaseException, beside: Path, target: Path) -> None:
    """Lets an error of the system name the target: of the name beside it nobody knows."""
    if isinstance(error, OSError):
        if isinstance(error.filename, (str, os.PathLike)):
            named = os.fspath(error.filename)
            error.filename = named.replace(str(beside), str(target))
        elif error.filename is None and error.errno is not None:  # written through a handle
            error.filename = str(target)
        if error.filename2 is not None:  # of a renaming: where it should have gone
            error.filename, error.filename2 = str(target), None


def _exchange(new: Path, target: Path, replace: bool) -> None:
    """Puts `new` in the place of the directory `target` and removes the older one."""
    if target.is_symlink():
        raise UnsupportedError(f"{target} is a symbolic link: give the directory it points to")
    lost = sorted({p.name for p in target.iterdir()} - {p.name for p in new.iterdir()})
    if lost and not replace:
        raise ConfigError(
            f"cannot replace the directory {target}: it also holds {', '.join(lost[:5])}"
            f"{' and more' if len(lost) > 5 else ''}; choose another directory or empty this one"
        )
    old = _beside(target)
    os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(file: Path) -> None:
    with open(file, "rb+") as handle:
        os.fsync(handle.fileno())


def _flush_directory(directory: Path) -> None:
    """Makes renames in a directory durable, where the system can open one (not on Windows)."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
