"""Standard input, where `-` stands for a prompt or a file of records."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pylora.commands.guard import note
from pylora.errors import ConfigError, DataError

_DEVICE = Path("/dev/stdin")


def text_or_stdin(given: str) -> str:
    """`given`, or for "-" all of standard input without the line break at its end."""
    if given != "-":
        return given
    _announce("the prompt")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not UTF-8 text (byte {error.start})") from None
    text = text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")
    if not text:
        raise DataError("standard input is empty: there is no prompt")
    return text


def file_or_stdin(given: Path | None) -> Path | None:
    """`given`, or for "-" the file that is standard input."""
    if given is None or str(given) != "-":
        return given
    if not os.path.exists(_DEVICE):
        raise ConfigError("this system has no file for standard input; write it to a file first")
    _announce("records")
    return _DEVICE


def _announce(what: str) -> None:
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError("standard input is closed; give a file, or a text")
    if sys.stdin.isatty():
        note(f"reading {what} from the terminal; Ctrl-D ends it")
