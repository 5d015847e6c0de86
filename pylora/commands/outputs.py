"""Whether what a verb is to write can be written: asked before anything long is begun.

A folder or file of another kind in its place, a parent that is no folder, a disk that is read-only
or a folder that is somebody else's: each is a ConfigError that names the place. Nothing is left
behind. That there is room enough is not looked at.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from pylora.errors import ConfigError


def check_folder(out: Path, *, what: str = "OUT") -> None:
    """ConfigError unless a folder can be made at `out`, or there is one that can be written in."""
    mode = _mode(out, what)
    if mode is not None and not stat.S_ISDIR(mode):
        raise ConfigError(f"{what} {out} is a file; name a folder")
    _probe(out if mode is not None else _above(out, what), out, what)
    if mode is not None and out.resolve().parent != out.resolve():
        _probe(out.resolve().parent, out, what)  # a folder is made beside it, then exchanged


def check_file(out: Path, *, what: str, suffix: str | None = None) -> None:
    """ConfigError unless a file can be written at `out`; `suffix` is what its name must end in."""
    if suffix is not None and out.suffix.lower() != suffix:
        raise ConfigError(f"{what} {out}: the name must end in {suffix}")
    mode = _mode(out, what)
    if mode is not None and stat.S_ISDIR(mode):
        raise ConfigError(f"{what} {out} is a folder; name a file in it")
    if mode is not None and not stat.S_ISREG(mode):
        raise ConfigError(f"{what} {out} is no ordinary file, and would be replaced; name another")
    _probe(_above(out, what), out, what)


def _mode(out: Path, what: str) -> int | None:
    """The mode of what is there; None if nothing is."""
    try:
        return os.stat(out).st_mode
    except FileNotFoundError:
        if out.is_symlink():
            raise ConfigError(
                f"{what} {out} is a symbolic link to {os.readlink(out)}, which does not exist"
            ) from None
        return None
    except NotADirectoryError:
        return None  # _above names the file that is in the way
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links
        raise ConfigError(f"{what} {out}: {_said(error)}") from None


def _above(out: Path, what: str) -> Path:
    """The nearest folder above `out` that exists."""
    for parent in Path(os.path.abspath(out)).parents:
        try:
            mode = os.stat(parent).st_mode
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(f"{what} {out}: {parent}: {_said(error)}") from None
        if not stat.S_ISDIR(mode):
            raise ConfigError(f"{what} {out} cannot be written: {parent} is a file, not a folder")
        return parent
    return Path(os.sep)


def _probe(folder: Path, out: Path, what: str) -> None:
    """ConfigError unless a folder can be made in `folder`."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".pylora-", dir=folder))
    except OSError as error:
        raise ConfigError(
            f"{what} {out} cannot be written: {folder}: {_said(error)}; name another place"
        ) from None


def _said(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)
