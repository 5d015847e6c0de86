"""Readers that mend what they should refuse: bytes of the container, the text of the settings.

Each changes a copy of the directory that the correct reader then sees."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pylora.conformance.correct.plain import Correct
from pylora.conformance.mutants.files import (
    CONFIG,
    WEIGHTS,
)
from pylora.conformance.mutants.registry import wrong
from pylora.conformance.protocol import LoraTriple
from pylora.types import Array

Modules = Mapping[str, tuple[int, int]]
Pairs = Mapping[str, tuple[Array, Array]]


class Mending(Correct):
    """Changes the bytes of a directory before the strict reader sees them."""

    def weights(self, raw: bytes) -> bytes:
        return raw

    def settings(self, text: bytes) -> bytes:
        return text

    def load(self, directory: str, modules: Modules) -> dict[str, LoraTriple]:
        with tempfile.TemporaryDirectory() as clean:
            for name, mend in ((WEIGHTS, self.weights), (CONFIG, self.settings)):
                file = Path(directory, name)
                if file.is_file():
                    Path(clean, name).write_bytes(mend(file.read_bytes()))
            return super().load(clean, modules)


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def whole(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@wrong(
    "read-rest-ignored",
    "subtle",
    "Bytes behind the last tensor are ignored.",
    "Offsets are all that a reader needs.",
)
class RestIgnored(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = parts(raw)
            end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
            return whole(entries, data[:end]) if 0 < end < len(data) else raw
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, IndexError):
            return raw


@wrong(
    "read-holes-and-overlaps",
    "subtle",
    "Where tensors lie is not compared: two may share bytes, or leave some out.",
    "Each tensor is read on its own.",
)
class HolesAndOverlaps(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = parts(raw)
            out, new, at = b"", {}, 0
            for name, entry in entries.items():
                if name == "__metadata__":
                    new[name] = entry
                    continue
                start, end = entry["data_offsets"]
                piece = data[start:end]
                if not 0 <= start <= end or len(piece) != end - start:
                    return raw
                new[name] = {**entry, "data_offsets": [at, at + len(piece)]}
                out, at = out + piece, at + len(piece)
            return whole(new, out)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-beyond-is-zero",
    "subtle",
    "A tensor that ends beyond the file is filled up with zeros.",
    "A buffer is made first, and as much is read as there is.",
)
class BeyondIsZero(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = parts(raw)
            end = max(e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__")
            if len(data) < end < len(data) + 2**20:
                starts = sorted(e["data_offsets"][0] for e in entries.values())
                return whole(entries, data + bytes(end - len(data))) if starts else raw
            return raw
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-by-order",
    "subtle",
    "Tensors are taken in the header's order, one behind the other, whatever their offsets say.",
    "Writers write them in order.",
)
class ByOrder(Mending):
    def weights(self, raw: bytes) -> bytes:
        try:
            entries, data = parts(raw)
            at = 0
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, end = entry["data_offsets"]
                    entry["data_offsets"] = [at, at + end - start]
                    at += end - start
            return whole(entries, data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return raw


@wrong(
    "read-dtype-in-any-case",
    "subtle",
    "A dtype that is spelt in small letters is read.",
    "upper(), to be kind to other writers.",
)
class DtypeAnyCase(Mending):
    def weights(self, raw: bytes) -> bytes:
        return raw.replace(b'"f32"', b'"F32"')


@wrong(
    "read-header-latin",
    "subtle",
    "A header that is not UTF-8 is read as far as possible.",
    "decode(errors='replace').",
)
class HeaderLatin(Mending):
    def weights(self, raw: bytes) -> bytes:
        return raw.replace(b', "\xff": 1', b"        ")


@wrong(
    "read-header-rest-ignored",
    "subtle",
    "What stands in the header behind its object is ignored.",
    "raw_decode in place of decode.",
)
class HeaderRest(Mending):
    def weights(self, raw: bytes) -> bytes:
        n = int.from_bytes(raw[:8], "little")
        text = raw[8 : 8 + n]
        return raw[:8] + text[:-3] + b"   " + raw[8 + n :] if text.endswith(b" {}") else raw


def _refuse(name: str) -> Any:
    raise ValueError(name)


@wrong(
    "settings-last-of-two",
    "subtle",
    "Of a setting that is there twice the last one counts.",
    "json.loads.",
)
class LastOfTwo(Mending):
    def settings(self, text: bytes) -> bytes:
        try:
            return json.dumps(json.loads(text, parse_constant=_refuse)).encode()
        except (ValueError, RecursionError):
            return text


@wrong(
    "settings-nan-accepted",
    "subtle",
    "NaN and Infinity in the settings are read as 0.",
    "Python's json writes them, and reads them.",
)
class SettingsNan(Mending):
    def settings(self, text: bytes) -> bytes:
        return text.replace(b"-Infinity", b"0").replace(b"Infinity", b"0").replace(b"NaN", b"0")


@wrong(
    "settings-python",
    "subtle",
    "Settings in Python's syntax are read.",
    "ast.literal_eval as a second try.",
)
class SettingsPython(Mending):
    def settings(self, text: bytes) -> bytes:
        import ast

        try:
            json.loads(text)
        except (ValueError, RecursionError):
            try:
                return json.dumps(ast.literal_eval(text.decode())).encode()
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return text
        return text
