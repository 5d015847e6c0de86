"""Every form of file gives the same records; what is no data is named with the way out."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pylora.errors import DataError
from pylora.training.reading import read_records

RECORDS = [
    {"prompt": "a b", "completion": 'c, "d"\n∃Ψ'},
    {"prompt": "e", "completion": "f"},
]


def content(path: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_records(path)]


def jsonl(records: list[Any] = RECORDS) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def table(delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    rows = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
    rows.writeheader()
    rows.writerows(RECORDS)
    return out.getvalue().encode()


FORMS: dict[str, bytes] = {
    "a.jsonl": jsonl(),
    "a.json": json.dumps(RECORDS).encode(),
    "b.json": b"\xef\xbb\xbf  " + json.dumps(RECORDS, indent=2).encode(),
    "a.csv": table(),
    "a.tsv": table("\t"),
    "a.jsonl.gz": gzip.compress(jsonl()),
    "a.json.bz2": bz2.compress(json.dumps(RECORDS).encode()),
    "a.csv.xz": lzma.compress(table()),
    "no ending": gzip.compress(json.dumps(RECORDS).encode()),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_records(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FORMS[name])
    assert content(tmp_path / name) == RECORDS


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([*RECORDS, {"text": "t", "prompt": None}]), file)
    assert content(file) == [*RECORDS, {"text": "t"}] or content(file)[:2] == RECORDS
    assert next(iter(read_records(file)))[0] == f"{file}: row 1"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="not a parquet file that can be read"):
        content(file)


def test_cells_of_csv_hold_json_where_a_record_has_an_array(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    chat = [{"role": "user", "content": "a"}]
    rows = csv.writer(open(file, "w", newline="", encoding="utf-8"))
    rows.writerow(["messages", "system"])
    rows.writerow([json.dumps(chat), ""])
    del rows
    assert content(file) == [{"messages": chat}]


OTHER: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "page": (b"<!DOCTYPE html>\n<html>", "web page"),
    "page2": (b"\n <html lang='en'>", "web page"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF model"),
    "weights": ((10).to_bytes(8, "little") + b'{"a":{}}  ', "safetensors"),
    "pickle": (pickle.dumps([1, 2]), "pickle"),
    "utf16": ('{"text": "a"}'.encode("utf-16"), "UTF-16"),
    "arrow": (b"ARROW1\0\0", "Dataset.to_json"),
    "zstd": (b"\x28\xb5\x2f\xfd\0\0", "zstd -d"),
    "pdf": (b"%PDF-1.7\n", "PDF"),
    "cut gzip": (gzip.compress(jsonl())[:-20], "damaged or cut off"),
    "no gzip": (b"\x1f\x8b" + b"\0" * 40, "damaged or cut off|cannot be read"),
    "pretty": (json.dumps(RECORDS[0], indent=2).encode(), "over several lines"),
    "wrapped": (json.dumps({"data": RECORDS}).encode(), "inside of the field 'data'"),
    "numbers": (b"[1, 2]", "record 1: a record must be a JSON object, not a number"),
    "cut array": (json.dumps(RECORDS).encode()[:-9], "not JSON"),
    "not utf8.csv": (b"prompt,completion\na,\xff\n", "not UTF-8"),
    "ragged.csv": (b"prompt,completion\na\n", "1 cells, but the first line names 2 columns"),
    "twice.csv": (b"prompt,prompt\na,b\n", "name each column once"),
    "quote.csv": (b'prompt,completion\n"a,b\n', "not CSV"),
    "prose.txt": (
        b"the sea is wide\n",
        'not JSON: .*; each line must be a JSON object, such as {"prompt',
    ),
    "arrays": (b'["a"]\n["b"]\n', "not JSON: Extra data at line 2, column 1"),
    "7z": (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    "numpy": (b"\x93NUMPY\x01\0", "a NumPy array"),
    "gzip in gzip": (gzip.compress(gzip.compress(jsonl())), "packed with gzip; unpack it"),
    "tar": (gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\0"), "a tar archive; unpack it"),
    "zeros": (bytes(64), "download was not finished"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_data_is_named_with_the_way_out(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(OTHER[name][0])
    with pytest.raises(DataError, match=OTHER[name][1]) as caught:
        content(file)
    assert str(caught.value).startswith(str(file))


def test_a_cell_may_be_as_long_as_a_line_and_the_modules_limit_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    (tmp_path / "a.csv").write_text("text,id\n" + "word " * 50_000 + ",1\n")
    assert len(content(tmp_path / "a.csv")[0]["text"]) == 250_000
    assert csv.field_size_limit() == limit


def test_a_zip_and_a_folder(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(DataError, match="spreadsheet; unpack it, or export the sheet as CSV"):
        content(tmp_path / "a.xlsx")
    with pytest.raises(DataError, match="directory without data files"):
        content(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    with pytest.raises(DataError, match="is a directory; name one of its files: train.jsonl"):
        content(tmp_path)


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.csv", "x.parquet"]))
def test_any_bytes_are_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    file = tmp_path_factory.getbasetemp() / name
    file.write_bytes(data)
    try:
        assert all(isinstance(record, dict) for record in content(file))
    except DataError as error:
        assert str(error).startswith(str(file))


@given(
    st.binary(max_size=60),
    st.sampled_from([b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\x00", b"[", b"PAR1"]),
)
def test_any_bytes_behind_a_mark_are_records_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, mark: bytes
) -> None:
    pytest.importorskip("pyarrow")
    file = tmp_path_factory.getbasetemp() / "y.jsonl"
    file.write_bytes(mark + data)
    try:
        content(file)
    except DataError as error:
        assert str(error).startswith(str(file))
