"""Reads a file of records, whatever form it has: JSONL, one JSON array, CSV, parquet; packed by
gzip, bzip2 or xz too. What is in a record is the next file's matter (records.py).

The form is told by the file's first bytes, not by its name (but for CSV, which has no mark). Every
error is a DataError that begins with the file and the line, or the number of the record.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from pylora.errors import DataError
from pylora.extras import need
from pylora.files.kinds import of_binary

Record = dict[str, Any]

_MAX_LINE = 64 * 2**20  # bytes; a longer line is not a record but a file of another form
_MAX_ARRAY = 2**30  # bytes of a JSON array, which has to be read whole
_HEAD = 512

_PACKED: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda f: cast(IO[bytes], gzip.GzipFile(fileobj=f)),
    b"BZh": lambda f: cast(IO[bytes], bz2.BZ2File(f)),
    b"\xfd7zXZ\x00": lambda f: cast(IO[bytes], lzma.LZMAFile(f)),
}
# What a file is that holds no records, by its first bytes; and the way out.
_OTHER: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"GGUF", "a GGUF model; the model comes first on the command line, the data second"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet; unpack it, or export the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it first (zstd -d FILE)"),
    (b"ARROW1", "an Arrow file; write it as JSONL (datasets: Dataset.to_json)"),
    (b"\xff\xff\xff\xff", "an Arrow stream; write it as JSONL (datasets: Dataset.to_json)"),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle, which can run code when it is read; write the records as JSONL",
    ),
    (b"SQLite format 3", "an SQLite database; export the table as CSV"),
    (b"%PDF", "a PDF document; training needs its text, as JSONL records"),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the data: the file itself was not downloaded; run `git lfs pull` "
        "in its repository",
    ),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text; save it as UTF-8"),
)


def read_records(path: str | os.PathLike[str]) -> Iterator[tuple[str, Record]]:
    """("file:line" or "file: record n", object) of each record, in the order of the file.

    Raises DataError for a file that cannot be read or holds no records, and for the first line
    that is not one; MissingExtraError for parquet without the extra that reads it.
    """
    name = os.fspath(path)
    try:
        if os.path.isdir(path):
            raise DataError(_of_folder(Path(path)))
        with open(path, "rb") as raw:
            yield from _unpacked(raw, name)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error
    except (EOFError, lzma.LZMAError) as error:
        raise DataError(f"{name}: the packed file is damaged or cut off: {error}") from error


def _unpacked(raw: IO[bytes], name: str) -> Iterator[tuple[str, Record]]:
    buffered = io.BufferedReader(cast(io.RawIOBase, raw), _HEAD)
    head = buffered.peek(_HEAD)
    for magic, unpack in _PACKED.items():
        if head.startswith(magic):
            inside = io.BufferedReader(cast(io.RawIOBase, unpack(buffered)), 1 << 16)
            try:
                yield from _of_kind(inside, name, Path(name).with_suffix("").suffix)
            except (OSError, ValueError, zlib.error) as error:
                if isinstance(error, DataError):
                    raise
                raise DataError(
                    f"{name}: the packed file is damaged or cut off: {error}"
                ) from error
            return
    yield from _of_kind(buffered, name, Path(name).suffix)


def _of_kind(file: Any, name: str, suffix: str) -> Iterator[tuple[str, Record]]:
    head = file.peek(_HEAD)[:_HEAD]
    if not head:
        raise DataError(f"{name}: the file is empty; it must hold one record a line, as JSON")
    if head.startswith(b"PAR1"):
        return _parquet(file, name)
    _refuse_other(head, name)
    if suffix.lower() in (".csv", ".tsv"):
        return _csv(file, name, "\t" if suffix.lower() == ".tsv" else ",")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    return _array(file, name) if text.startswith(b"[") else _lines(file, name)


def _refuse_other(head: bytes, name: str) -> None:
    """DataError for a file that is something else."""
    start = head.lstrip()[:16].lower()
    if start.startswith((b"<!doctype", b"<html")):
        raise DataError(
            f"{name}: this is a web page, not data; download the file itself (on a hub: the "
            "'raw' or 'resolve' address)"
        )
    for magic, what in _OTHER:
        if head.startswith(magic):
            raise DataError(f"{name}: this is {what}")
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        raise DataError(f"{name}: this is a safetensors file: weights, not records")
    if other := of_binary(head):
        raise DataError(f"{name}: this is {other}; training needs text: write the records as JSONL")


def _of_folder(folder: Path) -> str:
    inside = sorted(
        p.name
        for p in itertools.islice(folder.iterdir(), 1000)
        if p.name.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz"))
    )
    if inside:
        return f"{folder}: this is a directory; name one of its files: {', '.join(inside[:5])}"
    return f"{folder}: this is a directory without data files; name a file of records"


# ---- the forms -----------------------------------------------------------------------------------


def _lines(file: Any, name: str) -> Iterator[tuple[str, Record]]:
    number = 0
    while line := file.readline(_MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > _MAX_LINE:
            raise DataError(f"{where}: the line is longer than {_MAX_LINE} bytes")
        if not line.strip():
            continue
        if line.strip() == b"{":
            raise DataError(
                f"{where}: a JSON object over several lines; write each record on a line of its "
                "own, or all of them as one JSON array"
            )
        yield where, _object(_parse(line, where), where)


def _array(file: Any, name: str) -> Iterator[tuple[str, Record]]:
    data = file.read(_MAX_ARRAY + 1)
    if len(data) > _MAX_ARRAY:
        raise DataError(
            f"{name}: a JSON array of more than {_MAX_ARRAY} bytes; write one record a line (JSONL)"
        )
    values = _parse(data, name)
    if not isinstance(values, list):
        raise DataError(f"{name}: expected an array of records, got {type_name(values)}")
    for i, value in enumerate(values, 1):
        where = f"{name}: record {i}"
        yield where, _object(value, where)


def _csv(file: Any, name: str, delimiter: str) -> Iterator[tuple[str, Record]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows)
        if not all(header) or len(set(header)) != len(header):
            raise DataError(f"{name}: the first line must name each column once, got {header}")
        for row in _whole_cells(rows):
            where = f"{name}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{where}: {len(row)} cells, but the first line names {len(header)} columns"
                )
            yield where, {k: _cell(k, v, where) for k, v in zip(header, row) if v != ""}
    except csv.Error as error:
        raise DataError(f"{name}:{rows.line_num}: not CSV: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 near line {rows.line_num + 1}") from error
    except StopIteration:
        raise DataError(f"{name}: there is no header line") from None


def _whole_cells(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows, of cells as long as a line may be. The module's own limit is all the program's, so
    it is changed for the reading of a row alone."""
    while True:
        before = csv.field_size_limit(_MAX_LINE)
        try:
            row = next(rows, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


# What is an array or an object in a record is JSON in a cell.
_JSON_CELLS = (
    "messages conversations conversation tools functions documents chat_template_kwargs history"
).split()


def _cell(column: str, value: str, where: str) -> Any:
    if column in _JSON_CELLS and value.lstrip()[:1] in ("[", "{"):
        return _parse(value.encode(), f"{where}: column {column!r}")
    return value


def _parquet(file: Any, name: str) -> Iterator[tuple[str, Record]]:
    parquet = need("pyarrow.parquet")
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}: row {number}", {k: v for k, v in row.items() if v is not None}
    except DataError:
        raise
    except Exception as error:  # the library's own kinds; a damaged file can end in any of them
        raise DataError(f"{name}: not a parquet file that can be read: {error}") from error


_NO_JSON = (
    "; each line must be a JSON object, such as "
    '{"prompt": "...", "completion": "..."} to train on, {"prompt": "..."} to answer, or '
    '{"text": "..."} for plain text; a table is told by a name that ends in .csv or .tsv'
)


# ---- JSON ----------------------------------------------------------------------------------------


def _parse(data: bytes, where: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> Record:
        record = dict(pairs)
        if len(record) != len(pairs):
            raise DataError(f"{where}: a field occurs twice in one JSON object")
        return record

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        way_out = "" if error.pos else _NO_JSON
        raise DataError(
            f"{where}: not JSON: {error.msg} at {line}column {error.colno}{way_out}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: not a usable JSON value: {error}") from error


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be a JSON object, not {type_name(value)}")
    lists = [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
    if len(value) == 1 and lists and lists[0] in ("data", "train", "rows", "records", "examples"):
        raise DataError(
            f"{where}: the records are inside of the field {lists[0]!r}; write the array itself, "
            "or one record a line"
        )
    return value


def type_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")
