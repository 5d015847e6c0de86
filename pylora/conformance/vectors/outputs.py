"""What a port computed, read from the files that it wrote. Nothing in them is trusted.

A port writes a folder, or one file:

    <folder>/<case>/<output>.bin   raw, little-endian, row-major: float32 or float64 where there is
                                   a bound (the size says which), else the manifest's dtype
    <folder>/outputs.json          or the one file: {"format": "pylora-outputs", "version": 1,
                                   "cases": {case: {output: [numbers]}},
                                   "plans": {case: answer}, "files": ..., "converters": ...}

A number that JSON lacks is "nan", "inf" or "-inf". Lists may be nested in rows. Anything else in
the folder is named as foreign.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pylora.conformance.vectors.cases import Case
from pylora.errors import FileFormatError
from pylora.files.bounded import read_json
from pylora.types import Array

FORMAT = "pylora-outputs"
VERSION = 1
_JSON = "outputs.json"
_KINDS = ("plans", "files", "converters")
_LIMIT = 256 << 20  # bytes of outputs.json
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(eq=False)
class Outputs:
    """Where the outputs of a port are, by case and name; answers by kind and case."""

    where: Path
    arrays: dict[tuple[str, str], Any] = field(default_factory=dict)  # a path, or what JSON holds
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)


def find(where: str | os.PathLike[str], cases: list[Case]) -> Outputs:
    """The outputs in a folder or a JSON file. FileFormatError for what is neither."""
    root = Path(where)
    out = Outputs(root)
    known = {(case.name, name) for case in cases for name in case.outputs}
    if root.is_file():
        _from_json(root, out, known)
        return out
    if not root.is_dir():
        raise FileFormatError(f"{root}: there is no such folder; a port writes its outputs there")
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            file = Path(folder) / name
            inside = file.relative_to(root).as_posix()
            if inside == _JSON:
                _from_json(file, out, known)
                continue
            parts = inside.removesuffix(".bin").split("/")
            if name.endswith(".bin") and len(parts) == 2 and tuple(parts) in known:
                out.arrays[parts[0], parts[1]] = file
            else:
                out.foreign.append(inside)
    return out


def _from_json(file: Path, out: Outputs, known: set[tuple[str, str]]) -> None:
    text = read_json(file, limit=_LIMIT)
    if text.get("format") != FORMAT or text.get("version") != VERSION:
        raise FileFormatError(
            f'{file}: expected {{"format": "{FORMAT}", "version": {VERSION}, ...}}, found '
            f"format {text.get('format')!r:.60}, version {text.get('version')!r:.60}"
        )
    for key, value in text.items():
        if key in ("format", "version"):
            continue
        if key not in ("cases", *_KINDS) or not isinstance(value, Mapping):
            out.foreign.append(f"{file.name}: {key[:80]!r}")
            continue
        for case, inside in value.items():
            if key != "cases":
                out.answers[key, case] = inside
            elif not isinstance(inside, Mapping):
                out.foreign.append(f"{file.name}: cases/{case[:80]} is no object")
            else:
                for name, numbers in inside.items():
                    if (case, name) in known:
                        out.arrays.setdefault((case, name), numbers)
                    else:
                        out.foreign.append(f"{file.name}: cases/{case[:80]}/{name[:80]}")


def read(source: Any, want: Array, bounded: bool) -> Array:
    """The numbers of one output, flat: float64 where it has a bound, else in the dtype of `want`.

    ValueError, in words, where they are not as many or of another kind."""
    return (
        _file(source, want, bounded) if isinstance(source, Path) else _list(source, want, bounded)
    )


def _file(file: Path, want: Array, bounded: bool) -> Array:
    try:
        if not file.is_file():
            raise ValueError("is no ordinary file")
        size, n = file.stat().st_size, want.size
        if not bounded:
            fits = {want.nbytes: want.dtype.newbyteorder("<")}
        else:
            fits = {n * 4: np.dtype("<f4"), n * 8: np.dtype("<f8")}
        if size not in fits:
            ways = " or ".join(f"{count} ({dtype.name})" for count, dtype in fits.items())
            raise ValueError(f"has {size} bytes; {n} numbers are {ways}")
        array = np.frombuffer(file.read_bytes(), fits[size])
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from None
    return array.astype(np.float64 if bounded else want.dtype)


def _list(value: Any, want: Array, bounded: bool) -> Array:
    numbers: list[Any] = []
    _flatten(value, numbers, want.size)
    if len(numbers) != want.size:
        raise ValueError(f"has {len(numbers)} numbers, expected {want.size}")
    floating = want.dtype.kind == "f"
    if floating:
        numbers = [_WORDS.get(x, x) if isinstance(x, str) else x for x in numbers]
    allowed = (int, float) if floating else (int,)
    for x in numbers:
        if isinstance(x, bool) or not isinstance(x, allowed):
            raise ValueError(f"holds {x!r:.40}, which is no {'number' if floating else 'integer'}")
    try:
        with np.errstate(over="ignore"):
            if bounded or floating:
                return np.array(numbers, np.float64).astype(np.float64 if bounded else want.dtype)
        return np.array(numbers, want.dtype)
    except OverflowError:
        raise ValueError(f"holds an integer that {want.dtype.name} does not") from None


def _flatten(value: Any, into: list[Any], most: int) -> None:
    """Row by row; what is longer than it may be is cut off, and deeper than arrays are refused."""
    stack = [(value, 0)]
    while stack and len(into) <= most:
        item, depth = stack.pop()
        if not isinstance(item, list):
            into.append(item)
        elif depth > 4:
            raise ValueError("is nested more deeply than any array")
        else:
            stack.extend((x, depth + 1) for x in reversed(item))
