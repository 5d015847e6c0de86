"""Small files read with a limit: what is larger than plausible is refused before it is read.

A file that comes from elsewhere may be anything; settings, vocabularies and prompts are text of a
known order of size. Weights are not read here (pylora/formats).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pylora.errors import FileFormatError
from pylora.files.kinds import hint


def read_text(path: str | os.PathLike[str], *, limit: int) -> str:
    """The UTF-8 text of a small file. Raises FileFormatError if it is missing, not UTF-8 text or
    larger than `limit` bytes; the size is checked before anything is read."""
    file = Path(path)
    if not file.is_file():
        where = "a folder, not a file" if file.is_dir() else "there is no such file"
        raise FileFormatError(f"{file}: {where}")
    if (size := file.stat().st_size) > limit:
        raise FileFormatError(
            f"{file}: {size} bytes; a text such as is expected here has at most {limit}{hint(file)}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileFormatError(f"{file}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(f"{file}: this is not UTF-8 text ({error}){hint(file)}") from error


def read_json(path: str | os.PathLike[str], *, limit: int) -> dict[str, Any]:
    """The JSON object in a small file. Raises FileFormatError as `read_text` does, and if the text
    is not one JSON object."""
    try:
        value = json.loads(read_text(path, limit=limit))
    except FileFormatError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path}: this is not JSON ({error}){hint(path, 'JSON')}") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: this JSON is a {type(value).__name__}, not an object")
    return value
